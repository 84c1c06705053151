"""The engine's sizes, all in bytes, tokens or counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much the engine may hold and do at once."""

    kv_cache_bytes: int = 256 * 2**20
    adapter_arena_bytes: int = 256 * 2**20  # of adapters on the device
    poison_adapter_arena: bool = False  # make what is given up there NaN, so that a stale read shows
    block_size: int = 16  # tokens
    max_running: int = 64  # sequences in a forward pass
    max_waiting: int = 256  # requests beyond those that can run; more are refused
    token_budget: int = 512  # tokens in a forward pass
    prefix_cache: bool = True
    reader_queue_events: int = 1024  # events a reader may leave unread before its request is cancelled
