"""Errors of the trainer: of what it was asked to make, of the base it works on, of what it reads.

TrainerError
├── SettingsError          what was asked for cannot be, or contradicts itself
├── UnsuitableBaseError    a sound base that this cannot be done to
├── TextError              a text that cannot be read, is too short, or must not be used for this
├── DataError              samples that cannot be learned from
├── DivergedError          a training whose numbers are no longer finite
├── CheckpointError        a checkpoint of another training than the one that would go on from it
└── OutputError            a place where the result cannot be put
"""

from __future__ import annotations


class TrainerError(ValueError):
    """Carry a stable reason, the setting or config field at fault and a sentence."""

    def __init__(self, message: str, *, reason: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.reason, self.field)


def _rebuild(kind: type[TrainerError], message: str, reason: str, field: str | None) -> TrainerError:
    return kind(message, reason=reason, field=field)


class SettingsError(TrainerError):
    """Say which setting cannot be, and what would do."""


class UnsuitableBaseError(TrainerError):
    """Say why this cannot be done to a base that is sound in itself."""


class TextError(TrainerError):
    """Say what is wrong with a text that was given."""


class DataError(TrainerError):
    """Say which line of a dataset cannot be learned from, or that there are too few."""


class DivergedError(TrainerError):
    """Say at which step a loss, a gradient or a weight was no longer finite."""


class CheckpointError(TrainerError):
    """Say in what a checkpoint's training is not the one that would go on from it."""


class OutputError(TrainerError):
    """Say why a result cannot be put where it was asked for."""
