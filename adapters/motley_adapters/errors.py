"""Errors of adapters: of their files, their fit to the base and their keeping.

AdapterError
├── AdapterFormatError     the files are malformed, unsafe, contradictory or not supported
├── AdapterMismatchError   sound files that do not fit the base that is served
├── AdapterSetError        adapters that cannot be combined as asked
├── UnknownAdapterError    a digest that is not held
├── AdapterLoadError       a known adapter that did not come back
├── CapacityError          no room beside what is held
└── LeaseError             a lease or an entry handled out of turn
"""

from __future__ import annotations

_MAX_MESSAGE_CHARACTERS = 2000
_MAX_FIELD_CHARACTERS = 600


class AdapterError(ValueError):
    """Carry a stable reason, the file field or tensor at fault and a sentence.

    Semantics: both texts quote what strangers wrote, so they are shortened and made encodable as UTF-8 here.
    """

    def __init__(self, message: str, *, reason: str, field: str | None = None) -> None:
        self.message = _presentable(message, _MAX_MESSAGE_CHARACTERS)
        super().__init__(self.message)
        self.reason = reason
        self.field = None if field is None else _presentable(field, _MAX_FIELD_CHARACTERS)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.reason, self.field)


def _presentable(text: str, max_characters: int) -> str:
    if len(text) > max_characters:
        text = f"{text[: max_characters - 3]}..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _rebuild(kind: type[AdapterError], message: str, reason: str, field: str | None) -> AdapterError:
    return kind(message, reason=reason, field=field)


class AdapterFormatError(AdapterError):
    """Say what in the files is malformed, unsafe or not supported."""


class AdapterMismatchError(AdapterError):
    """Say how a sound adapter does not fit the base that is served."""


class AdapterSetError(AdapterError):
    """Say why these adapters with these weights are not a set."""


class UnknownAdapterError(AdapterError):
    """Say which digest is not held."""


class AdapterLoadError(AdapterError):
    """Say why a known adapter that had left memory could not come back."""


class CapacityError(AdapterError):
    """Say that adapters that are held fill the memory they may take."""


class LeaseError(AdapterError):
    """Say that a lease was released twice, or an entry removed while leased."""
