"""The text of one candidate, token by token: nothing is given out that a later token could still change.

Knows a tokenizer's decoder only by what it does, and stop strings; nothing of sampling, requests or streams. Runs on
the engine thread, one object a candidate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from motley_server.engine.stop_strings import StopMatcher

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_WINDOW = 16  # tokens decoded again at every step, at most, outside a run of byte tokens
_TAIL = 4
_MAX_BYTE_RUN = 64
_MIN_CHARACTERS = 3  # with so many, a tail of tokens cannot begin inside the character that its end leaves open


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' fast ones have it."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """Return the text of a list of tokens."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return one token as the vocabulary spells it, None if there is none."""


@dataclass(frozen=True, slots=True)
class DetokenizerDelta:
    """What some tokens added: text that is final, and whether a stop string ended it."""

    text: str
    stopped: bool


class IncrementalDetokenizer:
    """Turn a candidate's tokens into text as they come.

    Semantics: all the deltas and `finish` together are what the tokens add to the decoded prompt: the text of prompt
    and tokens, without the beginning that it shares with the text of the prompt alone; cut before the stop string
    that is complete first. A character that is not complete, text that may become a stop string, and a run of byte
    tokens are held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._text = _TextWindow(tokenizer, prompt_token_ids, skip_special_tokens)
        self._matcher = StopMatcher(stop)

    def append(self, token_ids: Sequence[int]) -> DetokenizerDelta:
        """Take tokens and return the text that they settle; after a stop string nothing more is taken."""
        text = ""
        for token_id in token_ids:
            if self._matcher.stopped:
                break
            text += self._matcher.push(self._text.push(token_id))
            if self._matcher.has_stops and self._text.is_run_short:
                text += self._matcher.push_if_final(self._text.peek())
        return DetokenizerDelta(text, self._matcher.stopped)

    def finish(self) -> str:
        """Return what was held back, no token being still to come."""
        return self._matcher.push(self._text.peek()) + self._matcher.flush()


class _TextWindow:
    """The last tokens, and how much of their text is settled.

    Semantics: a decoder's treatment of a token depends on little beside it: whether anything stands before it, an
    open UTF-8 sequence, and, where bytes have tokens of their own, the whole run of them, which becomes one U+FFFD a
    byte if any part of it is not UTF-8. So a few tokens of context that have text, the open character and the open
    run are decoded together. A run of 64 is settled as it stands, so that text all in bytes does stream.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._is_skipping = skip_special_tokens
        self._window = self._context_of(prompt_token_ids)
        self._settled = self._decode(self._window)
        self._run_length = 0  # byte tokens at the end of the window that were not decoded yet

    @property
    def is_run_short(self) -> bool:
        """Tell whether there is an open run of byte tokens, and it is cheap to peek at it."""
        return 0 < self._run_length <= _MAX_BYTE_RUN

    def push(self, token_id: int) -> str:
        """Take a token and return the text that it settles."""
        if self._is_byte(token_id):
            self._window.append(token_id)
            self._run_length += 1
            return self._settle_run() if self._run_length % _MAX_BYTE_RUN == 0 else ""
        if self._run_length and self._is_skipped(token_id):
            return ""
        self._window.append(token_id)
        self._run_length = 0
        text = self._decode(self._window)
        if text == self._settled and self._is_skipped(token_id):
            self._window.pop()
            return ""
        delta = self._settle(text.removesuffix(_REPLACEMENT))
        if len(self._window) > _MAX_WINDOW and text.startswith(self._settled):
            self._trim(len(text) - len(self._settled))
        return delta

    def peek(self) -> str:
        """Return the text held back, as it is if no token follows."""
        return _beyond(self._settled, self._decode(self._window))

    def _settle(self, text: str) -> str:
        delta = _beyond(self._settled, text)
        if not self._settled.startswith(text):  # a prompt may itself end inside a character
            self._settled = text
        return delta

    def _settle_run(self) -> str:
        context = self._window[: -self._run_length]
        context_text = self._decode(context)
        if not context_text:
            return ""  # nothing to stand before what comes next but the run itself
        for num_open in range(_TAIL):
            closed = self._window[: len(self._window) - num_open]
            text = self._decode(closed)
            if not text.endswith(_REPLACEMENT):
                break
        else:
            num_open, text = 0, self._decode(self._window)
        delta = self._settle(text)
        self._window = context + self._window[len(self._window) - num_open :]
        self._settled, self._run_length = context_text, num_open
        return delta

    def _trim(self, num_held: int) -> None:
        for start in range(len(self._window) - _TAIL, 0, -_TAIL):
            tail = self._window[start:]
            if self._is_context(tail):
                text = self._decode(tail)
                self._window, self._settled = tail, text[: len(text) - num_held]
                return

    def _context_of(self, token_ids: Sequence[int]) -> list[int]:
        size = _TAIL
        while size < len(token_ids) and not self._is_context(list(token_ids[-size:])):
            size *= 2
        return list(token_ids[-size:])

    def _is_context(self, token_ids: list[int]) -> bool:
        has_text_of_its_own = bool(self._decode([token_id for token_id in token_ids if not self._is_byte(token_id)]))
        return has_text_of_its_own and len(self._decode(token_ids)) >= _MIN_CHARACTERS

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _is_skipped(self, token_id: int) -> bool:
        """Tell whether the decoder never sees the token: a special one that is left out, or an id without a token."""
        if self._tokenizer.convert_ids_to_tokens(token_id) is None:
            return True
        return not self._decode([token_id]) and self._decode([token_id], is_skipping=False) != ""

    def _decode(self, token_ids: list[int], is_skipping: bool | None = None) -> str:
        # Cleaning up spaces would rewrite text that is already out.
        skip = self._is_skipping if is_skipping is None else is_skipping
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text


def _beyond(settled: str, text: str) -> str:
    """Return `text` without the beginning that it shares with what is settled."""
    if text.startswith(settled):
        return text[len(settled) :]
    shared = next((size for size, pair in enumerate(zip(settled, text, strict=False)) if pair[0] != pair[1]), len(text))
    return text[shared:]
