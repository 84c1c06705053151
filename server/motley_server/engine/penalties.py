"""What a request does to its logits before anything is chosen from them: penalties, biases, forbidden ends.

Touches only the tokens concerned, never the whole vocabulary, and only the rows that ask; which tokens those are,
logit_edits.py keeps from step to step. Runs on the engine thread.

Order: repetition penalty; then, in one addition, presence and frequency penalties and logit_bias; then
min_new_tokens. A bias is therefore not scaled by the repetition penalty, and cannot bring back a forbidden end.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from motley_server.engine.logit_edits import LogitEdits
from motley_server.engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides one candidate's next token, beside its logits.

    Semantics: `num_output_tokens` is the position that the random number is drawn for; `edits` has been told of each
    of these tokens, and is None only where `edits_of` says so.
    """

    params: SamplingParams
    candidate: int
    num_output_tokens: int
    edits: LogitEdits | None

    @property
    def is_ending_forbidden(self) -> bool:
        """Tell whether the candidate is still shorter than min_new_tokens."""
        return self.num_output_tokens < self.params.min_new_tokens


# One row's part in a step: where it is, its distinct token ids, and a number for each or one for all.
_Entry: TypeAlias = "tuple[int, array[int], array[float] | float]"


def has_edits(row: SamplingRow) -> bool:
    """Tell whether `edit_logits` would do anything to the row."""
    params = row.params
    is_counted = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    is_penalised = params.repetition_penalty != 1.0 or (is_counted and row.num_output_tokens > 0)
    return row.edits is not None and (is_penalised or bool(params.logit_bias) or row.is_ending_forbidden)


def edit_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply each row's penalties, biases and forbidden ends, in place.

    Semantics: repetition multiplies a negative logit and divides another, for every token of prompt or output; then
    bias, less presence, less frequency times the count in the output, is added as one float32 number; while the
    output is too short every eos and stop token is -inf. Ids outside the vocabulary mean nothing.
    Shapes: logits [N, V] float32, contiguous, one row each.
    """
    edited = [(index, row, row.edits) for index, row in enumerate(rows) if row.edits is not None]
    for _, _, edits in edited:
        edits.catch_up(logits.shape[1])
    _penalise_repetition(
        logits, [(index, edits.seen_ids, row.params.repetition_penalty) for index, row, edits in edited]
    )
    _add_changes(logits, [(index, edits.changed_ids, edits.changes) for index, _, edits in edited])
    _forbid_ends(logits, [(index, edits.end_ids, -math.inf) for index, row, edits in edited if row.is_ending_forbidden])


def _penalise_repetition(logits: Tensor, entries: Sequence[_Entry]) -> None:
    where, penalties = _gathered(logits, entries)
    before = logits.view(-1).index_select(0, where)
    logits.view(-1).scatter_(0, where, torch.where(before < 0, before * penalties, before / penalties))


def _add_changes(logits: Tensor, entries: Sequence[_Entry]) -> None:
    where, changes = _gathered(logits, entries)
    logits.view(-1).scatter_(0, where, changes.add_(logits.view(-1).index_select(0, where)))


def _forbid_ends(logits: Tensor, entries: Sequence[_Entry]) -> None:
    where, forbidden = _gathered(logits, entries)
    logits.view(-1).scatter_(0, where, forbidden)


def _gathered(logits: Tensor, entries: Sequence[_Entry]) -> tuple[Tensor, Tensor]:
    """Return the places in the flattened logits that the entries name, and the number that belongs to each.

    Semantics: put together on the CPU, where the lists are, so that a device takes part in two copies a step whatever
    the number of rows. Reads the lists' memory and keeps no hold on it.
    """
    total = sum(len(ids) for _, ids, _ in entries)
    where, numbers = torch.empty(total, dtype=torch.int64), torch.empty(total, dtype=logits.dtype)
    start = 0
    for index, ids, values in entries:
        if not ids:
            continue
        end = start + len(ids)
        torch.add(torch.frombuffer(ids, dtype=torch.int64), index * logits.shape[1], out=where[start:end])
        numbers[start:end] = torch.frombuffer(values, dtype=torch.float32) if isinstance(values, array) else values
        start = end
    return where.to(logits.device), numbers.to(logits.device)
