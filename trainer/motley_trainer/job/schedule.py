"""The learning rate of each step: a function of its number alone. Pure."""

from __future__ import annotations

import math

from motley_trainer.errors import SettingsError
from motley_trainer.spec.settings import OptimizerSettings, Schedule

WARMUP_SHARE = 10  # one step in so many
MAX_WARMUP_STEPS = 100


def warmup_steps(settings: OptimizerSettings, num_steps: int) -> int:
    """Return over how many steps the rate rises.

    Raises: SettingsError with reason BAD_SPEC if that is as long as the training.
    """
    if settings.warmup_steps is None:
        return min(num_steps // WARMUP_SHARE, MAX_WARMUP_STEPS)
    if settings.warmup_steps >= num_steps:
        field = "optimizer.warmup_steps"
        message = f"{field} {settings.warmup_steps} leaves none of the {num_steps} steps at the full rate"
        raise SettingsError(message, reason="BAD_SPEC", field=field)
    return settings.warmup_steps


def rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, the first being 0.

    Semantics: up to the full rate over the warm-up; then constant, or down towards 0, which a step after the last would
    have: along a line, or half a cosine.
    """
    warmup = warmup_steps(settings, num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    if settings.schedule is Schedule.CONSTANT:
        return settings.learning_rate
    gone = (step - warmup) / (num_steps - warmup)
    share = 1 - gone if settings.schedule is Schedule.LINEAR else (1 + math.cos(math.pi * gone)) / 2
    return settings.learning_rate * share
