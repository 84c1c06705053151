"""Which logits one candidate's request changes and by how much, kept up to date token by token.

Owns the lists that penalties.py adds and multiplies by; each is made once for a candidate and then follows its new
tokens, so that a step costs the same however long prompt and answer have become. Knows no tensors, requests or
blocks. Runs on the engine thread.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from motley_server.engine.types import SamplingParams


def edits_of(params: SamplingParams, prompt_token_ids: Sequence[int]) -> LogitEdits | None:
    """Return the edits of a candidate that starts, or None if its parameters never ask for any."""
    is_penalised = params.repetition_penalty != 1.0 or _counts_output(params)
    if is_penalised or params.logit_bias or params.min_new_tokens > 0:
        return LogitEdits(params, prompt_token_ids)
    return None


class LogitEdits:
    """The token ids that a candidate's penalties, biases and forbidden ends touch.

    Semantics: the lists are empty until `catch_up`, and hold no id twice and none outside the vocabulary; `changes`
    has one number for each of `changed_ids`, to be added to its logit. A tensor that shares a list's memory must be
    gone before the next `catch_up`.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.seen_ids = array("q")  # of prompt and output, for the repetition penalty alone
        self.changed_ids = array("q")
        self.changes = array("f")
        self.end_ids = array("q")
        self._params = params
        self._prompt_token_ids: Sequence[int] = prompt_token_ids
        self._is_prepared = False
        self._counts_output = _counts_output(params)
        self._repeats_matter = params.repetition_penalty != 1.0
        self._new_ids: list[int] = []
        self._seen: set[int] = set()
        self._counts: dict[int, int] = {}
        self._biases: dict[int, float] = {}
        self._places: dict[int, int] = {}

    def add(self, token_id: int) -> None:
        """Note a generated token."""
        if self._counts_output or self._repeats_matter:
            self._new_ids.append(token_id)

    def catch_up(self, vocab_size: int) -> None:
        """Bring the lists up to the last token added.

        Semantics: reads prompt and parameters the first time, later the new tokens alone; `vocab_size` is always the
        same.
        """
        if not self._is_prepared:
            self._prepare(vocab_size)
        for token_id in self._new_ids:
            if 0 <= token_id < vocab_size:
                self._take(token_id)
        self._new_ids.clear()

    def _prepare(self, vocab_size: int) -> None:
        params = self._params
        if self._repeats_matter:
            self._seen = {token_id for token_id in self._prompt_token_ids if 0 <= token_id < vocab_size}
            self.seen_ids = array("q", self._seen)
        for token_id, bias in params.logit_bias:
            if 0 <= token_id < vocab_size:
                self._biases[token_id] = self._biases.get(token_id, 0.0) + bias
        self.changed_ids, self.changes = array("q", self._biases.keys()), array("f", self._biases.values())
        if self._counts_output:
            self._places = {token_id: place for place, token_id in enumerate(self._biases)}
        if params.min_new_tokens > 0:
            ends = {*params.eos_token_ids, *params.stop_token_ids}
            self.end_ids = array("q", [token_id for token_id in ends if 0 <= token_id < vocab_size])
        self._prompt_token_ids = ()
        self._is_prepared = True

    def _take(self, token_id: int) -> None:
        if self._repeats_matter and token_id not in self._seen:
            self._seen.add(token_id)
            self.seen_ids.append(token_id)
        if not self._counts_output:
            return
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        params = self._params
        penalty = params.presence_penalty + params.frequency_penalty * count
        change = self._biases.get(token_id, 0.0) - penalty
        place = self._places.setdefault(token_id, len(self.changed_ids))
        if place == len(self.changed_ids):
            self.changed_ids.append(token_id)
            self.changes.append(change)
        else:
            self.changes[place] = change


def _counts_output(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
