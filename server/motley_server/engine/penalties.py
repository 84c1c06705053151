"""What a request does to its logits before anything is chosen from them: penalties, biases, forbidden ends.

Touches only the tokens concerned, never the whole vocabulary, and only the rows that ask. Runs on the engine thread.

Order: repetition penalty; then, in one addition, presence and frequency penalties and logit_bias; then
min_new_tokens. A bias is therefore not scaled by the repetition penalty, and cannot bring back a forbidden end.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from motley_server.engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides one candidate's next token, beside its logits.

    Semantics: of `prompt_token_ids` only the set matters; the length of `output_token_ids` is the position that the
    random number is drawn for.
    """

    params: SamplingParams
    candidate: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]

    @property
    def is_ending_forbidden(self) -> bool:
        """Tell whether the candidate is still shorter than min_new_tokens."""
        return len(self.output_token_ids) < self.params.min_new_tokens


def has_edits(row: SamplingRow) -> bool:
    """Tell whether `edit_logits` would do anything to the row."""
    params = row.params
    is_penalised = bool(row.output_token_ids) and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0)
    return is_penalised or params.repetition_penalty != 1.0 or bool(params.logit_bias) or row.is_ending_forbidden


def edit_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply each row's penalties, biases and forbidden ends, in place.

    Semantics: repetition multiplies a negative logit and divides another, for every token of prompt or output; then
    bias, less presence, less frequency times the count in the output, is added as one float32 number; while the
    output is too short every eos and stop token is -inf. Ids outside the vocabulary mean nothing.
    Shapes: logits [N, V] float32, one row each.
    """
    _penalise_repetition(logits, rows)
    _add_biases(logits, rows)
    _forbid_ends(logits, rows)


def _penalise_repetition(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = []
    for index, row in enumerate(rows):
        if row.params.repetition_penalty != 1.0:
            seen = array("q", row.prompt_token_ids) + array("q", row.output_token_ids)
            entries.append((index, seen, array("d", [row.params.repetition_penalty]) * len(seen)))
    where, penalties = _gathered(logits, entries)
    before = logits[where]
    # A token seen twice is written twice, with the same value.
    logits[where] = torch.where(before < 0, before * penalties, before / penalties)


def _add_biases(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = []
    for index, row in enumerate(rows):
        biases = _biases(row)
        if biases:
            entries.append((index, array("q", biases.keys()), array("d", biases.values())))
    where, added = _gathered(logits, entries)
    logits[where] += added


def _biases(row: SamplingRow) -> dict[int, float]:
    params = row.params
    biases: dict[int, float] = {}
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        counts = Counter(row.output_token_ids)
        biases = {
            token_id: -(params.presence_penalty + params.frequency_penalty * count)
            for token_id, count in counts.items()
        }
    for token_id, bias in params.logit_bias:
        biases[token_id] = biases.get(token_id, 0.0) + bias
    return biases


def _forbid_ends(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = []
    for index, row in enumerate(rows):
        if row.is_ending_forbidden:
            ends = array("q", {*row.params.eos_token_ids, *row.params.stop_token_ids})
            entries.append((index, ends, array("d", [-math.inf]) * len(ends)))
    where, forbidden = _gathered(logits, entries)
    logits[where] = forbidden


def _gathered(
    logits: Tensor, entries: Sequence[tuple[int, array[int], array[float]]]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Turn (row, token ids, a number for each) into one index of logits and the numbers that belong there.

    Semantics: goes by arrays, because a tensor made of a list of Python numbers takes ten times as long.
    """
    ids, numbers = array("q"), array("d")
    for _, some_ids, some_numbers in entries:
        ids += some_ids
        numbers += some_numbers
    if not ids:
        empty = torch.empty(0, dtype=torch.int64, device=logits.device)
        return (empty, empty), logits.new_empty(0)
    lengths = torch.tensor([len(some_ids) for _, some_ids, _ in entries])
    places = torch.tensor([index for index, _, _ in entries]).repeat_interleave(lengths)
    columns = torch.frombuffer(ids, dtype=torch.int64)
    is_known = (columns >= 0) & (columns < logits.shape[1])
    where = (places[is_known].to(logits.device), columns[is_known].to(logits.device))
    return where, torch.frombuffer(numbers, dtype=torch.float64)[is_known].to(logits.device, logits.dtype)
