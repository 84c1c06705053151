"""Which modules a PEFT config means: names, expressions and layers, as in PEFT.

A tenant writes these expressions, and an expression can be made to run for years on a short name. So all matching of
one config shares one budget of time, runs outside the interpreter lock, and refuses what would make compilation itself
expensive. It knows nothing of tensors. Any thread but the event loop's.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable

import regex

from motley_adapters.errors import AdapterFormatError
from motley_adapters.formats import show
from motley_adapters.peft_config import PeftLoraConfig

MAX_PATTERN_CHARACTERS = 4096
MAX_REPETITIONS = 10_000
MATCHING_BUDGET_SECONDS = 2.0

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")
_COUNTED_REPEAT = re.compile(r"\{([0-9]*)(?:,([0-9]*))?\}")
# Sound to `re`, but with another meaning to the engine that can be stopped: nested sets and set operations; a brace
# that counts nothing is fuzzy matching there.
_TWO_MEANINGS = re.compile(r"\[[^\]]*\[|--|&&|\|\||~~|\{(?![0-9]*,?[0-9]*\})|\{,?\}")


class PatternMatcher:
    """Match module paths against one config's expressions, within a budget of time.

    Semantics: expressions are put together as PEFT does, so that they mean the same; plain names cost none of the
    budget.
    """

    def __init__(self, budget_seconds: float = MATCHING_BUDGET_SECONDS) -> None:
        self._remaining_seconds = budget_seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def selects(self, path: str, config: PeftLoraConfig) -> bool:
        """Tell whether a config means the module at a path.

        Semantics: exclusions win; a name that is the whole path needs no layer number, one that only ends it does.
        Raises: AdapterFormatError with reason BAD_PATTERN or PATTERN_TOO_SLOW, naming the field.
        """
        if config.exclude_modules and self._names(path, config.exclude_modules, "exclude_modules"):
            return False
        if not self._names(path, config.target_modules, "target_modules"):
            return False
        if not config.layers_to_transform or path in config.target_modules:
            return True
        return self._layer_index(path, config.layers_pattern) in config.layers_to_transform

    def first_key(self, path: str, keys: Iterable[str], field: str) -> str | None:
        """Return the first key of a pattern that ends the path at a dot, or None.

        Raises: AdapterFormatError with reason BAD_PATTERN or PATTERN_TOO_SLOW, naming the field and the key.
        """
        for key in keys:
            if _PLAIN_NAME.fullmatch(key):
                if _ends_with_plain(path, key):
                    return key
            elif self._match(rf"(.*\.)?({key})$", path, f'{field}["{key}"]') is not None:
                return key
        return None

    def _names(self, path: str, names: str | tuple[str, ...], field: str) -> bool:
        if isinstance(names, str):
            return self._match(names, path, field, whole=True) is not None
        if not path.endswith(names):  # all names at once, in C: most paths end here
            return False
        return path in names or any(path.endswith(f".{name}") for name in names)

    def _layer_index(self, path: str, layers_patterns: tuple[str, ...]) -> int | None:
        if not layers_patterns:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
            return int(found[1]) if found else None
        for pattern in layers_patterns:
            match = self._match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path, "layers_pattern")
            if match is not None:
                return int(match["idx"]) if match["idx"] else None
        return None

    def _match(self, pattern: str, path: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
        field = f"adapter_config.{name}"
        begin = time.monotonic()
        try:
            if self._remaining_seconds <= 0:
                raise TimeoutError
            compiled = self._compiled.get(pattern)
            if compiled is None:
                compiled = self._compiled[pattern] = _compile(pattern, field)
            match = compiled.fullmatch if whole else compiled.match
            return match(path, timeout=self._remaining_seconds, concurrent=True)
        except TimeoutError:
            message = f"{field} takes more than its time to match the base's {show(path)}; write a simpler expression"
            raise AdapterFormatError(message, reason="PATTERN_TOO_SLOW", field=field) from None
        finally:
            self._remaining_seconds -= time.monotonic() - begin


def _ends_with_plain(path: str, key: str) -> bool:
    # To PEFT a plain name is an expression too, in which a dot stands for any character.
    begin = len(path) - len(key)
    if begin < 0 or (begin > 0 and path[begin - 1] != "."):
        return False
    return all(wanted in (".", actual) for wanted, actual in zip(key, path[begin:], strict=True))


def _compile(pattern: str, field: str) -> regex.Pattern[str]:
    def refuse(problem: str) -> AdapterFormatError:
        message = f"{field} is not an expression that is matched here: {problem}"
        return AdapterFormatError(message, reason="BAD_PATTERN", field=field)

    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise refuse(f"{len(pattern)} characters, at most {MAX_PATTERN_CHARACTERS}")
    if found := _TWO_MEANINGS.search(pattern):
        raise refuse(f"{show(found[0])} is ambiguous")
    # Repetitions inside repetitions multiply, and so does the time it takes to compile them.
    repeats = _COUNTED_REPEAT.findall(pattern)
    if any(len(digits) > 6 for pair in repeats for digits in pair):
        raise refuse("too many repetitions")
    if math.prod(max(1, *(int(digits or 0) for digits in pair)) for pair in repeats) > MAX_REPETITIONS:
        raise refuse("too many repetitions")
    try:
        re.compile(pattern)  # what PEFT would take
        return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise refuse(str(error)) from None
