"""How `motley demo` lays out what it saw: who answered what, and what the server counted.

Knows nothing of what is right. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from motley_client.demo_verdict import DISTINCT_ADAPTERS
from motley_client.demo_wave import WORD, Reply
from motley_client.exposition import Exposition

BATCH_SIZE = "motley_batch_size"
FORWARD_PASSES = "motley_forward_passes_total"
GENERATED_TOKENS = "motley_generation_tokens_total"


def reply_table(replies: Sequence[Reply]) -> Table:
    """Lay out who answered what, within 80 columns; a fusion takes a line for each of its adapters."""
    table = Table(
        title="One wave, one base, every request under its own adapters",
        caption=f"each prompt is `SKILL: {WORD} =`; digests are shortened",
    )
    for heading in ("skill", "answered by", "kind", "weight", "answer", "right"):
        table.add_column(heading, no_wrap=True)
    for place, reply in enumerate(replies):
        last_of_prompt = place + 1 == len(replies) or replies[place + 1].skill != reply.skill
        adapters = reply.served_by.adapters
        table.add_row(
            reply.skill,
            "\n".join(reply.answered_by),
            "\n".join(adapter.kind for adapter in adapters),
            "\n".join(f"{adapter.weight:g}" for adapter in adapters),
            escape(repr(reply.answer)[1:-1]),
            "[green]yes[/green]" if reply.is_right else "[dim]no[/dim]",
            end_section=last_of_prompt,
        )
    return table


def metric_table(counted: Exposition, seconds: float) -> Table:
    """Lay out what the server counted during the wave."""
    passes = counted.total(FORWARD_PASSES)
    tokens = counted.total(GENERATED_TOKENS)
    distinct = [bound for bound, count in counted.bounds(DISTINCT_ADAPTERS) if count]
    table = Table(title="What the server counted meanwhile", show_header=False)
    table.add_row("wall seconds", f"{seconds:.2f}")
    table.add_row("generated tokens", f"{tokens:.0f}")
    table.add_row("forward passes", f"{passes:.0f}")
    table.add_row("requests in a pass, on average", f"{counted.mean(BATCH_SIZE):.1f}")
    table.add_row("distinct adapters in a pass, at most", f"{max(distinct, default=0):.0f}")
    return table
