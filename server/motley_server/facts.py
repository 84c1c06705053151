"""What a server is, as it tells its callers: fixed once it has started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from motley_bases.spec import BaseSpec


class MemoryLedger(Protocol):
    """What the base and things on it take on the device, in bytes, as the bases' ledger counts it."""

    @property
    def weight_bytes(self) -> int:
        """Return what the weights take."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Return what the keys and values of a token take."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Return the sizes of the layers' Linears."""

    def adapter_bytes(self, rank: int) -> int:
        """Return what a LoRA of this rank on all of them takes."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The facts of one running server; bounds are those that requests are held to."""

    version: str
    base: BaseSpec
    ledger: MemoryLedger
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
