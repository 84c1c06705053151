"""Errors of the bases: a checkpoint that cannot be read, or that must not be served."""

from __future__ import annotations


class BaseError(ValueError):
    """Carry a stable reason, the config field at fault and a sentence."""

    def __init__(self, message: str, *, reason: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field


class UnreadableBaseError(BaseError):
    """Say what is missing or broken in the checkpoint directory."""


class UnsupportedBaseError(BaseError):
    """Say why a sound checkpoint would be served wrongly here, and so is not served."""


class UnknownSiteError(BaseError):
    """Say which module path names nothing that an adapter can attach to."""


class UnboundSlotError(BaseError):
    """Say which slots a batch names that nothing is bound under."""
