"""Single tokens on a CPU: what the compiled loop needs to know of a batch at one Linear.

A decode step has one token of each sequence, and each may have units of its own, so there is little to multiply
together. One compiled loop takes each token through its members where they lie. This module lists who uses what; it
knows nothing of runs, and is imported only where a CPU serves, for numba's sake. The engine thread runs it. Dimension
letters as in `singles_kernel`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from motley_kernels.adapter_delta import singles_kernel
from motley_kernels.adapter_delta.places import Found, Member, find_unit
from motley_kernels.adapter_delta.pool import UnitPool, write_units
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit
from motley_kernels.errors import ShapeError

log = logging.getLogger(__name__)

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

COMPILED = singles_kernel.compile_all(is_cached=True)
"""The loop by the dtype of inputs and outputs."""


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Which single tokens of a batch use which members; Linears where the same slots have units share it."""

    tokens: Integers
    starts: Integers
    members: Integers


@dataclass(frozen=True, eq=False, slots=True)
class Singles:
    """The single tokens of a batch at one Linear, which has `num_rows` rows in all; see `singles_kernel`.

    `memory` owns what `weights` and `channels` are views of.
    """

    num_rows: int
    pairs: Pairs
    units: Integers
    scales: Floats
    weights: Floats
    channels: np.ndarray[tuple[int, ...], np.dtype[np.int32]]
    memory: Tensor

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the deltas to `y`, in place, with one rounding; any leading dimensions."""
        compiled = COMPILED.get(y.dtype)
        if compiled is None or x.dtype != y.dtype or not y.is_contiguous():
            self._add_to_other(y, x)
            return
        x, pairs = x.contiguous(), self.pairs
        compiled(
            y.data_ptr(), x.data_ptr(), self.num_rows, x.shape[-1], y.shape[-1],
            pairs.tokens, pairs.starts, pairs.members, self.units, self.scales, self.weights, self.channels,
        )  # fmt: skip

    def _add_to_other(self, y: Tensor, x: Tensor) -> None:
        """Add the deltas to an output that is not compiled for, by way of float32."""
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        delta = torch.zeros(y.shape, dtype=torch.float32)
        self.add_to(delta, x.to(torch.float32))
        tokens = torch.from_numpy(self.pairs.tokens)
        y.index_copy_(0, tokens, y.index_select(0, tokens).add_(delta.index_select(0, tokens)))


def warm_up(dtype: torch.dtype) -> None:
    """Have the loop compiled, or loaded from where an earlier process kept it, and this thread's count of threads kept.

    Semantics: what was kept and cannot be used, a damaged file or a full disk, is passed by: the loop is compiled anew.
    """
    unit = find_unit(DeltaUnit(torch.zeros(1, 8), torch.zeros(1, 8), 1.0), (8, 8))
    batch = DeltaBatch.from_sets([((0, 1.0),)])
    singles = make_singles(batch, [[Member(0, unit, 1.0)]], (8, 8))
    assert singles is not None
    row = torch.zeros(1, 8, dtype=dtype)
    try:
        singles.add_to(row, row.clone())
    except Exception as error:  # unpickling what is damaged raises nearly anything; what is really wrong raises again
        log.warning("the compiled loop on disk cannot be used, compiling it anew: %r", error)
        COMPILED.update(singles_kernel.compile_all(is_cached=False))
        singles.add_to(row, row.clone())
    if numba.threading_layer() != "omp":
        log.warning(
            "adapters run in a second pool of threads (%s), which is slower: no libgomp was found",
            numba.threading_layer(),
        )


def _share_threads() -> None:
    """Take as many threads as torch may on this thread; starting numba's would otherwise raise torch's count."""
    wanted = torch.get_num_threads()
    numba.set_num_threads(min(wanted, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def make_singles(batch: DeltaBatch, members: Sequence[Sequence[Member]], sides: tuple[int, int]) -> Singles | None:
    """List the single tokens, given each segment's members in the set's order, none of them for a run.

    Raises: ShapeError for tokens that the batch has not.
    """
    flat = [member for of_segment in members for member in of_segment]
    if not flat:
        return None
    _share_threads()
    key = ("pairs", tuple([tuple([member.slot for member in of_segment]) for of_segment in members]))
    pairs = batch.layouts.get(key)
    if not isinstance(pairs, Pairs):
        batch.layouts[key] = pairs = _make_pairs(batch, members)
    found = _in_one_memory([member.found for member in flat], sides)
    memory = found[0].unit.tensors[0].untyped_storage()
    floats = torch.empty(0, dtype=torch.float32).set_(memory, 0, (memory.nbytes() // 4,), (1,))
    return Singles(
        num_rows=batch.num_tokens,
        pairs=pairs,
        units=np.array([one.row for one in found], dtype=np.int64),
        scales=np.array([member.scale for member in flat], dtype=np.float32),
        weights=floats.numpy(),
        channels=floats.view(torch.int32).numpy(),
        memory=floats,
    )


def _make_pairs(batch: DeltaBatch, members: Sequence[Sequence[Member]]) -> Pairs:
    """List tokens so that threads that take equal stretches of them have equally much to read."""
    tokens: list[int] = []
    first_member: list[int] = []
    num_members: list[int] = []
    cost: list[int] = []
    first = 0
    for segment, of_segment in zip(batch.segments, members, strict=True):
        if of_segment:
            count = len(segment.token_indices)
            tokens += segment.token_indices.tolist()
            first_member += [first] * count
            num_members += [len(of_segment)] * count
            cost += [sum(member.found.nbytes for member in of_segment)] * count
            first += len(of_segment)
    if not 0 <= min(tokens) <= max(tokens) < batch.num_tokens:
        raise ShapeError(f"tokens {min(tokens)} to {max(tokens)} of {batch.num_tokens}")
    order = np.argsort(-np.array(cost), kind="stable")
    if min(cost) != max(cost):
        num_threads = torch.get_num_threads()
        order = np.concatenate([order[thread::num_threads] for thread in range(num_threads)])
    counts = np.array(num_members)[order]
    starts = np.concatenate(([0], np.cumsum(counts)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return Pairs(np.array(tokens)[order], starts, np.repeat(np.array(first_member)[order], counts) + within)


def _in_one_memory(found: Sequence[Found], sides: tuple[int, int]) -> Sequence[Found]:
    """Return units as they are where one memory holds them all, as a pool does; otherwise copies in such a memory."""
    if found[0].address is not None and all(one.address == found[0].address for one in found):
        return found
    units = [one.unit for one in found]
    device = torch.device("cpu")
    pool = UnitPool(
        UnitPool(0, device=device, dtype=torch.float32).extent_bytes(units), device=device, dtype=torch.float32
    )
    placed = pool.place(0, units)
    write_units(placed, units)
    return [find_unit(unit, sides) for unit in placed]
