"""The steps before which LoQT merges: a function of its settings, and of how many steps there are. Pure."""

from __future__ import annotations

import math

from motley_trainer.errors import SettingsError
from motley_trainer.spec.settings import LoqtSchedule, LoqtSettings

INTERVAL = 100  # steps, unless a spec says how many
SHARE = 5  # of all steps, where those are few: an interval is one in so many
LEAST_INTERVAL = 2  # a factor that begins anew at every step never learns


def interval_of(settings: LoqtSettings, num_steps: int) -> int:
    """Return the steps from the first factors to the first merge."""
    if settings.merge_interval is not None:
        return settings.merge_interval
    return min(INTERVAL, max(LEAST_INTERVAL, num_steps // SHARE))


def check_interval(settings: LoqtSettings, num_steps: int, field: str) -> None:
    """Refuse an interval that was asked for and is never over; `field` is where the settings stand in a spec.

    Raises: SettingsError with reason BAD_SPEC and the interval's field.
    """
    asked = settings.merge_interval
    if asked is not None and asked >= num_steps:
        message = (
            f"{field}.merge_interval is {asked}, and there are {num_steps} steps: nothing would ever be merged, which "
            f"{field}.schedule {LoqtSchedule.NEVER} asks for"
        )
        raise SettingsError(message, reason="BAD_SPEC", field=f"{field}.merge_interval")


def merge_steps(settings: LoqtSettings, num_steps: int) -> tuple[int, ...]:
    """Return before which steps, the first being 0, the factors begin: at 0 for the first time, then by a merge each.

    Semantics: with an interval tau and a growth g, T(1) = tau and T(i + 1) = T(i) + tau + more(i), more(i) being the
    whole part of g to the power of i for EXPONENTIAL, of i * g for LINEAR, and 0 for STATIC.
    """
    if settings.schedule is LoqtSchedule.NEVER:
        return (0,)
    steps, interval = [0], interval_of(settings, num_steps)
    while (after := steps[-1] + interval + _more(settings, len(steps) - 1)) < num_steps:
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
