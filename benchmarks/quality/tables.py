"""Markdown from numbers: paragraphs, tables, and figures with their spread.

Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from textwrap import fill

WIDTH = 160


def paragraph(text: str) -> str:
    """Write a paragraph, filled; whatever whitespace it has is a space."""
    return fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Write the mean of several seeds, with the least and the greatest where they differ."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{form(fmean(values))} ({low} to {high})"


def perplexity(value: float) -> str:
    """Write a perplexity, with the digits that it is good for."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def loss(value: float) -> str:
    """Write a loss, with the digits that it is good for."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def percent(value: float) -> str:
    """Write a share."""
    return f"{value:.1%}"


def times(value: float) -> str:
    """Write how often one thing is another."""
    return f"{value:.3f} times"


def number(value: float) -> str:
    """Write a count, or the mean of counts."""
    return f"{value:,.0f}"


def megabytes(value: float) -> str:
    """Write an amount of memory, in millions of bytes."""
    return f"{value / 1e6:,.1f} MB"
