"""From what the scheduler chose to the tensors of one forward pass.

Rows are packed sequence after sequence and padded to a multiple of eight: with that, a row of a matrix product does not
depend on how many rows its neighbours bring. Runs on the engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
import torch
from motley_kernels.adapter_delta.types import DeltaBatch
from motley_kernels.paged_attention.types import PagedBatch
from numpy.typing import NDArray
from torch import Tensor

from motley_server.engine.pins import UnitSet
from motley_server.engine.scheduler import Scheduled

ROW_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One forward pass.

    Shapes: input_ids, positions [T]; logit_rows [S], the rows whose logits are wanted, sequence after sequence; T and S
    include padding.
    """

    input_ids: Tensor
    positions: Tensor
    paged: PagedBatch
    logit_rows: Tensor
    num_tokens: int  # without padding
    logit_counts: tuple[int, ...]  # how many of the logit rows are each sequence's; the rest is padding


def padded(num_rows: int) -> int:
    """Return the row count that a matrix product is given for this many rows."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


class InputBatchBuilder:
    """Build input batches on one device."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device

    def build(self, scheduled: ListLike[Scheduled]) -> InputBatch:
        """Lay out the scheduled tokens.

        Semantics: a sequence that catches up wants the logits of its last row; one whose prompt is scored wants those
        of every row that predicts a token after the context.
        """
        num_tokens = sum(entry.num_tokens for entry in scheduled)
        num_rows = padded(num_tokens)
        input_ids = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        slot_mapping = np.full(num_rows, -1, dtype=np.int64)
        block_tables = np.zeros((len(scheduled), max(len(e.sequence.block_table) for e in scheduled)), dtype=np.int64)
        logit_rows: list[int] = []
        row = 0
        for index, entry in enumerate(scheduled):
            sequence, start, stop = entry.sequence, entry.sequence.num_computed_tokens, row + entry.num_tokens
            end = start + entry.num_tokens
            table = np.frombuffer(sequence.block_table, dtype=np.int64)
            block_tables[index, : len(table)] = table
            input_ids[row:stop] = sequence.token_ids[start:end]
            positions[row:stop] = np.arange(start, end)
            slot_mapping[row:stop] = self._slots(table, positions[row:stop])
            logit_rows.extend(row + position - start for position in wanted_positions(entry))
            row = stop
        paged = PagedBatch(
            block_size=self._block_size,
            block_tables=self._tensor(block_tables),
            slot_mapping=self._tensor(slot_mapping),
            query_lens=tuple(entry.num_tokens for entry in scheduled),
            seq_lens=tuple(entry.sequence.num_computed_tokens + entry.num_tokens for entry in scheduled),
        )
        logit_rows.extend([0] * (padded(len(logit_rows)) - len(logit_rows)))
        return InputBatch(
            input_ids=self._tensor(input_ids),
            positions=self._tensor(positions),
            paged=paged,
            logit_rows=self._tensor(np.array(logit_rows, dtype=np.int64)),
            num_tokens=num_tokens,
            logit_counts=tuple(len(wanted_positions(entry)) for entry in scheduled),
        )

    def _slots(self, table: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return table[positions // self._block_size] * self._block_size + positions % self._block_size

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)


class DeltaBatchCache:
    """Make the adapters' view of a forward pass, and keep it while neither composition nor layout changes.

    While the same sequences decode, every step has the same view: the implementation's own metadata, kept inside it,
    then lives as long.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._key: object = None
        self._views = (DeltaBatch(0, ()), DeltaBatch(0, ()))

    def views(self, sets: ListLike[UnitSet], batch: InputBatch) -> tuple[DeltaBatch, DeltaBatch]:
        """Return the view of all rows and that of the rows whose logits are wanted, given each sequence's unit set."""
        key = (tuple(sets), batch.paged.query_lens, batch.logit_counts)
        if key != self._key:
            self._views = (self._view(sets, batch.paged.query_lens), self._view(sets, batch.logit_counts))
            self._key = key
        return self._views

    def _view(self, sets: ListLike[UnitSet], counts: ListLike[int]) -> DeltaBatch:
        num_rows = sum(counts)
        base_alone = ((), padded(num_rows) - num_rows)
        return DeltaBatch.from_sequences([*zip(sets, counts, strict=True), base_alone], self._device)


def wanted_positions(entry: Scheduled) -> range:
    """Return the positions whose logits a scheduled sequence wants."""
    sequence, start = entry.sequence, entry.sequence.num_computed_tokens
    end = start + entry.num_tokens
    if sequence.request.prompt_logprobs:
        return range(max(start, sequence.request.num_context_tokens - 1), min(end, sequence.num_tokens - 1))
    return range(end - 1, end) if entry.catches_up else range(0)
