"""The steps before which LoQT merges: a function of its settings alone. Pure."""

from __future__ import annotations

import math

from motley_trainer.spec.settings import LoqtSchedule, LoqtSettings


def merge_steps(settings: LoqtSettings, num_steps: int) -> tuple[int, ...]:
    """Return before which steps, the first being 0, the factors begin: at 0 for the first time, then by a merge each.

    Semantics: with an interval tau and a growth g, T(1) = tau and T(i + 1) = T(i) + tau + more(i), more(i) being the
    whole part of g to the power of i for EXPONENTIAL, of i * g for LINEAR, and 0 for STATIC.
    """
    steps = [0]
    if settings.schedule is LoqtSchedule.NEVER:
        return (0,)
    while (after := steps[-1] + settings.merge_interval + _more(settings, len(steps) - 1)) < num_steps:
        steps.append(after)
    return tuple(steps)


def _more(settings: LoqtSettings, num_merges: int) -> int:
    """Return by how much the interval after so many merges is longer than the first."""
    match settings.schedule:
        case LoqtSchedule.EXPONENTIAL:
            return math.floor(settings.growth**num_merges) if num_merges else 0
        case LoqtSchedule.LINEAR:
            return math.floor(settings.growth * num_merges)
        case _:
            return 0
