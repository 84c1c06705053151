"""The lines of a dataset, each turned into parts of text of which some are learned.

The first line decides which shape all have. A dataset was checked when it was uploaded; what is wrong here all the same
ends the job with the line's number. Knows nothing of tokens. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from motley_trainer.data.conversations import ASSISTANT, TemplateMisfitError, answers_in
from motley_trainer.errors import DataError


class DatasetFormat(StrEnum):
    """What the lines of a dataset are."""

    COMPLETION = "completion"
    CHAT = "chat"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Passage:
    """One line as the text that the model sees.

    Semantics: characters [start, end) of each learned span are learned, in their order. `has_special_tokens` is whether
    the tokenizer adds its own around it, `ends` whether an end-of-sequence token follows, learned too, and `answers`
    whether the last span, where nothing follows it, is an answer to what stands before it.
    """

    line: int
    text: str
    learned: tuple[tuple[int, int], ...]
    has_special_tokens: bool = True
    ends: bool = True
    answers: bool = True


def read_passages(
    path: Path,
    digest: str,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    *,
    on_line: Callable[[int, float], None] = lambda number, share: None,
) -> Iterator[Passage]:
    """Yield a dataset's lines, and check at the end that it was the one of this digest.

    Semantics: before each line `on_line` is called with its number and the share of the bytes before it.
    Raises: DataError with reason BAD_LINE, CHAT_TEMPLATE, DATASET_CHANGED, DATASET_UNREADABLE or TOO_LITTLE_DATA; the
    sentence names the line where it is one's fault.
    """
    format: DatasetFormat | None = None
    found = hashlib.sha256()
    num_bytes = 0
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            for number, line in enumerate(file, 1):
                on_line(number, num_bytes / total)
                num_bytes += len(line)
                found.update(line)
                format, passage = _read_line(number, line, format, tokenizer, field)
                yield passage
    except OSError as error:
        raise DataError(f"{field} cannot be read: {error}", reason="DATASET_UNREADABLE", field=field) from error
    if digest != f"sha256:{found.hexdigest()}":
        message = f"{field} is not the dataset {digest}: its bytes are sha256:{found.hexdigest()}"
        raise DataError(message, reason="DATASET_CHANGED", field=field)
    if format is None:
        raise DataError(f"{field} has no sample", reason="TOO_LITTLE_DATA", field=field)


def _read_line(
    number: int, line: bytes, format: DatasetFormat | None, tokenizer: PreTrainedTokenizerBase, field: str
) -> tuple[DatasetFormat, Passage]:
    def refuse(problem: str, reason: str = "BAD_LINE") -> DataError:
        return DataError(f"line {number} of {field} {problem}", reason=reason, field=field)

    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not JSON: {error}") from None
    keys = frozenset(sample) if isinstance(sample, dict) else frozenset()
    own = _SHAPES.get(keys)
    if own is None:
        raise refuse("has not prompt and completion, or messages, or text, and nothing else")
    if format is not None and own is not format:
        raise refuse(f"is of the shape {own}, and the lines before it of the shape {format}")
    try:
        if own is DatasetFormat.CHAT:
            return own, _chat(number, sample["messages"], tokenizer)
        return own, _plain(number, sample)
    except _UnfitError as error:
        raise refuse(str(error)) from None
    except TemplateMisfitError as error:
        raise refuse(str(error), "CHAT_TEMPLATE") from error


_SHAPES: Mapping[frozenset[str], DatasetFormat] = {
    frozenset({"prompt", "completion"}): DatasetFormat.COMPLETION,
    frozenset({"messages"}): DatasetFormat.CHAT,
    frozenset({"text"}): DatasetFormat.TEXT,
}


class _UnfitError(Exception):
    """Say what a line has that a sample has not, as the rest of a sentence."""


def _plain(number: int, sample: Mapping[str, object]) -> Passage:
    for name, value in sample.items():
        if not isinstance(value, str):
            raise _UnfitError(f"has a {name} that is no text")
    if "text" in sample:
        text = str(sample["text"])
        return Passage(number, text, ((0, len(text)),), answers=False)
    prompt, completion = str(sample["prompt"]), str(sample["completion"])
    text = prompt + completion
    return Passage(number, text, ((len(prompt), len(text)),))


def _chat(number: int, messages: object, tokenizer: PreTrainedTokenizerBase) -> Passage:
    turns = _turns(messages)
    if tokenizer.chat_template is None:
        raise TemplateMisfitError("is a conversation, and the base has no chat template")

    def render(turns: Sequence[Mapping[str, str]], is_answer_next: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [*map(dict, turns)], tokenize=False, add_generation_prompt=is_answer_next
            )
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise TemplateMisfitError(f"is refused by the base's chat template: {error}") from error
        return str(text)

    text = render(turns, False)
    return Passage(number, text, answers_in(turns, text, render), has_special_tokens=False, ends=False)


def _turns(messages: object) -> list[Mapping[str, str]]:
    if not isinstance(messages, list):
        raise _UnfitError("has messages that are no list")
    for turn in messages:
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise _UnfitError("has a turn with other than role and content")
        if not all(isinstance(value, str) for value in turn.values()):
            raise _UnfitError("has a turn whose role or content is no text")
    if not any(turn["role"] == ASSISTANT for turn in messages):
        raise _UnfitError("has no turn of the assistant, of which alone is learned")
    return messages
