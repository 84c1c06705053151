"""What a server is, as it tells its callers: fixed once it has started."""

from __future__ import annotations

from dataclasses import dataclass

from motley_bases.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The facts of one running server; bounds are those that requests are held to."""

    version: str
    base: BaseSpec
    device: str
    kernel: str
    adapter_kinds: tuple[str, ...]
    context_length: int  # tokens
    max_message_bytes: int
    max_prompt_bytes: int
    max_running: int
    max_waiting: int
    adapter_cache_bytes: int
    adapter_arena_bytes: int
