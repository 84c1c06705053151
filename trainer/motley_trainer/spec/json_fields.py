"""One JSON object, read field by field: each is what it should be, or refused by its path.

Knows JSON as protobuf writes it, and no field's meaning. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import TypeVar, overload

from motley_trainer.errors import SettingsError

Word = TypeVar("Word", bound=StrEnum)

MAX_NAMES = 4096
MAX_SHOWN = 100

_WHOLE = re.compile(r"-?[0-9]{1,20}")


class JsonFields:
    """Read the fields of one object; what was not read by the end is unknown.

    Semantics: `path` is the object's own, empty for the outermost. None stands for an object that is not there: every
    field of it has its default.
    Raises: SettingsError with reason BAD_SPEC and the field's path.
    """

    def __init__(self, value: object, path: str, *, is_map: bool = False) -> None:
        self._path = path
        self._is_map = is_map
        self._read: set[str] = set()
        if value is not None and not isinstance(value, dict):
            raise self.error("", "is not an object")
        self._fields: dict[str, object] = value or {}

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._fields))

    def get(self, name: str) -> object:
        """Return a field as it is, None where it is not there."""
        self._read.add(name)
        return self._fields.get(name)

    def child(self, name: str) -> JsonFields:
        """Return a message inside this one."""
        return JsonFields(self.get(name), self._path_of(name))

    def map(self, name: str) -> JsonFields:
        """Return a map inside this message."""
        found = JsonFields(self.get(name), self._path_of(name), is_map=True)
        if len(found._fields) > MAX_NAMES or "" in found:
            raise self.error(name, f"has more than {MAX_NAMES} names, or an empty one")
        return found

    def end(self) -> None:
        """Refuse what nobody has asked for."""
        for name in self:
            if name not in self._read:
                raise self.error(name, "is not known here, so what it changes is not either")

    def whole(self, name: str, least: int, most: int, default: int) -> int:
        """Return a whole number within bounds."""
        found = self.whole_or_none(name, least, most)
        return default if found is None else found

    def whole_or_none(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number within bounds, None where it is not there."""
        value = self.get(name)
        if isinstance(value, str) and _WHOLE.fullmatch(value):
            value = int(value)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"is {shown(value)}, not a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, **bounds: float) -> float:
        """Return a finite number within bounds; see `number_or_none`."""
        found = self.number_or_none(name, **bounds)
        return default if found is None else found

    def number_or_none(
        self,
        name: str,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
        most: float = math.inf,
        below: float = math.inf,
    ) -> float | None:
        """Return a finite number in [least, most] and in (above, below), None where it is not there."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"is {shown(value)}, not a number")
        if not (least <= value <= most and above < value < below):
            kept = [
                f"{text} {bound:g}"
                for text, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
                if math.isfinite(bound)
            ]
            raise self.error(name, f"is {shown(value)}, not a finite number {' and '.join(kept)}")
        return float(value)

    def flag(self, name: str) -> bool:
        """Return true or false, which is the default."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, f"is {shown(value)}, not true or false")
        return bool(value)

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        value = self.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, f"is {shown(value)}, not a text")
        return value

    def one_of(self, name: str, texts: Collection[str]) -> str:
        """Return a text that must be there, and is one of these."""
        value = self.text(name)
        if value not in texts:
            raise self.error(name, f"is {shown(value)}, not {' or '.join(texts)}")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of texts, none of them empty."""
        value = self.get(name) or []
        if not isinstance(value, list) or len(value) > MAX_NAMES or not all(isinstance(v, str) and v for v in value):
            raise self.error(name, f"is not a list of at most {MAX_NAMES} names")
        return tuple(value)

    @overload
    def word(self, name: str, words: type[Word], prefix: str, default: Word) -> Word: ...
    @overload
    def word(self, name: str, words: type[Word], prefix: str, default: None) -> Word | None: ...
    def word(self, name: str, words: type[Word], prefix: str, default: Word | None) -> Word | None:
        """Return a value of an enum, which JSON has as its name in capitals after a prefix."""
        value = self.get(name)
        if value in (None, f"{prefix}UNSPECIFIED"):
            return default
        for word in words:
            if value == f"{prefix}{word.value.upper()}":
                return word
        raise self.error(name, f"is {shown(value)}, not {' or '.join(prefix + word.value.upper() for word in words)}")

    def error(self, name: str, problem: str) -> SettingsError:
        """Make the refusal of a field, or of the object itself where the name is empty."""
        path = self._path_of(name) if name else self._path or "spec"
        return SettingsError(f"{path} {problem}", reason="BAD_SPEC", field=path)

    def _path_of(self, name: str) -> str:
        if self._is_map:
            return f'{self._path}["{name}"]'
        return f"{self._path}.{name}" if self._path else name


def shown(value: object) -> str:
    """Quote a value that a stranger wrote."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
