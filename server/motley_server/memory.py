"""What the server's memory is for, as one line of the log: the bases' ledger beside the sizes that were configured.

Counted from the base's config, before anything of it is measured, so that the line is what `motley base plan` says.
Runs once, on the thread that starts the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from motley_server.config import MIB, EngineConfig

if TYPE_CHECKING:
    from motley_bases.base import Base
    from motley_bases.ledger import Ledger

SHOWN_RANKS = (8, 16, 64)


def ledger_of(base: Base) -> Ledger:
    """Count what a base takes as it is served."""
    from motley_bases.ledger import Weights, make_ledger

    return make_ledger(base.model.config, Weights(base.dtype, base.spec.quantization, base.device))


def ledger_line(ledger: Ledger, sizes: EngineConfig) -> str:
    """Return the line that the server prints as it starts."""
    tokens = ledger.kv_tokens(sizes.kv_cache_bytes, sizes.block_size)
    ranks = ", ".join(
        f"{sizes.adapter_arena_bytes // ledger.adapter_bytes(rank)} of rank {rank}"
        for rank in SHOWN_RANKS
        if ledger.linears
    )
    return (
        f"weights {ledger.weight_bytes / MIB:.1f} MiB; KV cache {sizes.kv_cache_bytes / MIB:.1f} MiB, {tokens} tokens "
        f"at {ledger.kv_bytes_per_token} bytes; adapters on the device {sizes.adapter_arena_bytes / MIB:.1f} MiB"
        + (f", as many as {ranks}" if ranks else "")
    )
