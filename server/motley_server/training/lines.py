"""The lines of a dataset, each of them checked before a job can name it: JSON, of one shape, with something to learn.

One line is in memory at a time, and no line may be long, so that the memory of a check does not depend on a file's
size, and its time grows no faster than that. It knows no owners and no store. It blocks, and computes: it runs on a
thread of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, NoReturn

from motley_server.errors import InvalidArgumentError
from motley_server.registry.dataset_records import DatasetFormat

MAX_LINE_BYTES: Final = 1 << 20
MIN_SAMPLES: Final = 2  # one to train on, one to hold out
ASSISTANT: Final = "assistant"


@dataclass(frozen=True, slots=True)
class Lines:
    """What a file's lines are."""

    format: DatasetFormat
    num_samples: int


def check_lines(path: Path) -> Lines:
    """Check a file line by line, and return what its lines are.

    Semantics: a line ends with a line feed, or with the file; a carriage return before it is no part of it.
    Raises: InvalidArgumentError (reason=LINE_TOO_LONG, LINE_NOT_UTF8, LINE_NOT_JSON, UNKNOWN_SAMPLE_SHAPE,
    MIXED_SAMPLE_SHAPES, WRONG_SAMPLE_TYPE or EMPTY_SAMPLE, with the line's number as field; EMPTY_DATASET or
    TOO_FEW_SAMPLES); OSError.
    """
    format: DatasetFormat | None = None
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                found = _format_of(line)
                if found != (format or found):
                    raise _BadLineError(
                        "MIXED_SAMPLE_SHAPES", f"is of the shape {found.value}, and those before are not"
                    )
            except _BadLineError as error:
                message = f"line {number} {error.problem}"
                raise InvalidArgumentError(message, reason=error.reason, field=f"line {number}") from None
            format = found
    if format is None:
        raise InvalidArgumentError("the file has no line", reason="EMPTY_DATASET", field="line 1")
    if number < MIN_SAMPLES:
        message = f"{number} sample is not enough: training takes {MIN_SAMPLES} at least, one of them to measure by"
        raise InvalidArgumentError(message, reason="TOO_FEW_SAMPLES", field=f"line {number}")
    return Lines(format, number)


class _BadLineError(Exception):
    """Say what a line is or has that it must not, as the rest of a sentence."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason
        self.problem = problem


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines without their ends; of one that is too long, a little more than is allowed."""
    while line := file.readline(MAX_LINE_BYTES + len(b"\r\n")):
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def _format_of(line: bytes) -> DatasetFormat:
    """Return which of the shapes a line has."""
    if len(line) > MAX_LINE_BYTES:
        raise _BadLineError("LINE_TOO_LONG", f"has more than {MAX_LINE_BYTES} bytes")
    sample = _parse(line)
    if not isinstance(sample, dict):
        raise _BadLineError("UNKNOWN_SAMPLE_SHAPE", f"is {_kind(sample)} and no object")
    format = _SHAPES.get(frozenset(sample))
    if format is None:
        message = f"has {_keys(sample)}, and a sample has prompt and completion, or messages, or text, and nothing else"
        raise _BadLineError("UNKNOWN_SAMPLE_SHAPE", message)
    _CHECKS[format](sample)
    return format


def _parse(line: bytes) -> object:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise _BadLineError("LINE_NOT_UTF8", f"is no UTF-8: its byte {error.start + 1} cannot be read") from None
    if not text.strip():
        raise _BadLineError("LINE_NOT_JSON", "is blank")
    if text.startswith("\ufeff"):
        raise _BadLineError("LINE_NOT_JSON", "begins with a byte order mark, which is no JSON")
    try:
        sample: object = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _BadLineError("LINE_NOT_JSON", f"is no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _BadLineError("LINE_NOT_JSON", "is no JSON that is read here: it is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _BadLineError("LINE_NOT_JSON", f"is no JSON that is read here: {error}") from None
    return sample


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()  # of one line's keys there may be a hundred thousand, and each is looked at once
        for name, _ in pairs:
            if name in seen:
                raise _BadLineError("LINE_NOT_JSON", f"has {_show(name)} twice in one object")
            seen.add(name)
    return found


def _no_constant(text: str) -> NoReturn:
    raise _BadLineError("LINE_NOT_JSON", f"is no JSON: {text} is no number there")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _check_completion(sample: Mapping[str, object]) -> None:
    _text(sample, "prompt")
    if not _text(sample, "completion"):
        raise _BadLineError("EMPTY_SAMPLE", "has an empty completion, of which nothing can be learned")


def _check_text(sample: Mapping[str, object]) -> None:
    if not _text(sample, "text"):
        raise _BadLineError("EMPTY_SAMPLE", "has an empty text, of which nothing can be learned")


def _check_chat(sample: Mapping[str, object]) -> None:
    turns = sample["messages"]
    if not isinstance(turns, list):
        raise _BadLineError("WRONG_SAMPLE_TYPE", f"has messages that are {_kind(turns)} and no list")
    has_answer = False
    for index, turn in enumerate(turns):
        where = f"messages[{index}]"
        if not isinstance(turn, dict):
            raise _BadLineError("WRONG_SAMPLE_TYPE", f"has {where} that is {_kind(turn)} and no object")
        if turn.keys() != {"role", "content"}:
            message = f"has {where} with {_keys(turn)}, and a turn has role and content, and nothing else"
            raise _BadLineError("UNKNOWN_SAMPLE_SHAPE", message)
        if not _text(turn, "role", where):
            raise _BadLineError("EMPTY_SAMPLE", f"has {where} with an empty role")
        content = _text(turn, "content", where)
        if turn["role"] == ASSISTANT and not content:
            raise _BadLineError("EMPTY_SAMPLE", f"has {where}, of the assistant, without a content")
        has_answer |= turn["role"] == ASSISTANT
    if not has_answer:
        raise _BadLineError("EMPTY_SAMPLE", "has no turn of the assistant, of which alone can be learned")


_SHAPES: Final[Mapping[frozenset[str], DatasetFormat]] = MappingProxyType({
    frozenset({"prompt", "completion"}): DatasetFormat.COMPLETION,
    frozenset({"messages"}): DatasetFormat.CHAT,
    frozenset({"text"}): DatasetFormat.TEXT,
})  # fmt: skip
_CHECKS: Final[Mapping[DatasetFormat, Callable[[Mapping[str, object]], None]]] = MappingProxyType({
    DatasetFormat.COMPLETION: _check_completion,
    DatasetFormat.CHAT: _check_chat,
    DatasetFormat.TEXT: _check_text,
})  # fmt: skip


def _text(holder: Mapping[str, object], name: str, where: str = "") -> str:
    value = holder[name]
    called = f"{where}.{name}" if where else name
    if not isinstance(value, str):
        raise _BadLineError("WRONG_SAMPLE_TYPE", f"has a {called} that is {_kind(value)} and no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair of \u escapes, which no tokenizer takes
        message = f"has a {called} that is no text: its character {error.start + 1} is half of a pair"
        raise _BadLineError("LINE_NOT_UTF8", message) from None
    return value


def _kind(value: object) -> str:
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "true or false"), ((int, float), "a number"), (str, "a text"), (list, "a list"), (dict, "an object"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def _keys(holder: Mapping[str, object]) -> str:
    names = sorted(holder)
    shown = " and ".join(_show(name) for name in names[:4])
    return f"{shown}{' and others' if len(names) > 4 else ''}" if names else "no keys"


def _show(name: str) -> str:
    # Escaped, as a key may be half of a pair too.
    return ascii(name[:40])
