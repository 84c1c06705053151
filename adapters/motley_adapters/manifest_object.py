"""Strict reading of one JSON object of the manifest: every field has a type, a range and a name in its errors.

It knows JSON values and nothing of kinds. Pure; any thread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import show

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


class ManifestObject:
    """One object of the manifest, and where it stands there: `motley_manifest.goat`.

    Semantics: every reading method raises AdapterFormatError with reason MISSING_FIELD for a field that is not there
    and INVALID_FIELD for one of another type or out of range.
    """

    def __init__(self, fields: Mapping[str, object], path: str) -> None:
        self._fields = fields
        self.path = path

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def allow(self, *names: str) -> None:
        """Refuse fields of other names.

        Raises: AdapterFormatError with reason UNKNOWN_FIELD.
        """
        for name in self._fields:
            if name not in names:
                raise self.error("UNKNOWN_FIELD", name, "is not a field of this schema version")

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a whole number from low to high."""
        value = self._value(name)
        if type(value) is not int or not low <= value <= high:
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """Return a number from low to high."""
        value = self._value(name)
        # type() because true is an int to Python; the comparison refuses infinity, which 1e999 becomes
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):  # type: ignore[operator, arg-type]
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of several words."""
        value = self._value(name)
        if not isinstance(value, str) or value not in choices:
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not one of {', '.join(choices)}")
        return value

    def word(self, name: str) -> str:
        """Return a string."""
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not a string")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self._value(name)
        if not isinstance(value, bool):
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not true or false")
        return value

    def digest(self, name: str) -> str:
        """Return "sha256:..."."""
        value = self._value(name)
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not sha256: and 64 hexadecimal digits")
        return value

    def child(self, name: str) -> ManifestObject:
        """Return an object inside."""
        value = self._value(name)
        if not isinstance(value, dict):
            raise self.error("INVALID_FIELD", name, f"is {show(value)}, not an object")
        return ManifestObject(value, f"{self.path}.{name}")

    def is_null(self, name: str) -> bool:
        """Tell whether a field is there and says null."""
        return self._value(name) is None

    def error(self, reason: str, name: str, problem: str) -> AdapterFormatError:
        """Return an error that names a field of this object."""
        field = f"{self.path}.{name}"
        return AdapterFormatError(f"{field} {problem}", reason=reason, field=field)

    def _value(self, name: str) -> object:
        if name not in self._fields:
            raise self.error("MISSING_FIELD", name, "is missing")
        return self._fields[name]
