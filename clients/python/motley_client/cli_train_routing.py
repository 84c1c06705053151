"""Where tokens went, in a few words: a line of `motley train watch`.

Pure functions.
"""

from __future__ import annotations

from motley_client.types_training import RoutingReport


def routing_words(report: RoutingReport) -> str:
    """Write the least and the largest share that an expert of a module has, beside what all have if they are alike."""
    modules = [shares for shares in report.modules.values() if shares]
    if not modules:
        return "routing: no experts"
    most, least = max(max(shares) for shares in modules), min(min(shares) for shares in modules)
    even = " or ".join(f"{1 / number:.1%}" for number in sorted({len(shares) for shares in modules}, reverse=True))
    return f"routing: experts have {least:.1%} to {most:.1%} of tokens over {len(modules)} modules; even is {even}"
