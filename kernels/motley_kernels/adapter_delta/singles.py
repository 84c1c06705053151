"""Single tokens on a CPU: what the compiled loop needs to know of a batch at one Linear.

A decode step has one token of each sequence, and each may have units of its own, so there is little to multiply
together. One compiled loop takes each token through its members where they lie. This module finds units in memory and
lists who uses them; it knows nothing of runs. The engine thread runs it. Dimension letters as in `singles_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from motley_kernels.adapter_delta import singles_kernel
from motley_kernels.adapter_delta.pool import UnitPool, write_units
from motley_kernels.adapter_delta.singles_kernel import ABSENT
from motley_kernels.adapter_delta.types import DeltaBatch, DeltaUnit, Segment

Integers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

COMPILED = {
    torch.bfloat16: singles_kernel.add_bfloat16_tokens,
    torch.float32: singles_kernel.add_float32_tokens,
}


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """A unit looked at once: its row for the compiled loop, and the address of the memory in which that is true.

    `address` is None where the loop cannot read the unit as it lies; `is_empty` says that it can add nothing.
    """

    unit: DeltaUnit
    row: tuple[int, ...]
    address: int | None
    is_empty: bool
    nbytes: int


class Member(NamedTuple):
    """One member of a set at a Linear where it has a unit."""

    slot: int
    found: Found
    scale: float  # weight * scaling


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


def find_unit(unit: DeltaUnit) -> Found:
    """Look at a unit where it lies."""
    tensors = unit.tensors
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    is_readable = len(addresses) == 1 and all(
        tensor.is_contiguous() and tensor.dtype == (torch.float32 if tensor.is_floating_point() else torch.int32)
        for tensor in tensors
    )
    return Found(
        unit=unit,
        row=_describe(unit),
        address=addresses.pop() if is_readable else None,
        is_empty=not all(tensor.numel() for tensor in tensors),
        nbytes=unit.nbytes,
    )


def make_singles(batch: DeltaBatch, members: Sequence[Sequence[Member]]) -> Singles | None:
    """List the single tokens, given each segment's members in the set's order, none of them for a run."""
    flat = [member for of_segment in members for member in of_segment]
    if not flat:
        return None
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # of this thread, as torch's is
    key = ("pairs", tuple([tuple([member.slot for member in of_segment]) for of_segment in members]))
    pairs = batch.layouts.get(key)
    if not isinstance(pairs, Pairs):
        batch.layouts[key] = pairs = _make_pairs(batch.segments, members)
    found = _in_one_memory([member.found for member in flat])
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


def add_singles(y: Tensor, x: Tensor, singles: Singles) -> None:
    """Add the deltas of the single tokens to `y`, in place, with one rounding; any leading dimensions."""
    compiled = COMPILED.get(y.dtype)
    if compiled is None or x.dtype != y.dtype or not y.is_contiguous():
        _add_other(y, x, singles)
        return
    x, pairs = x.contiguous(), singles.pairs
    compiled(
        y.data_ptr(), x.data_ptr(), singles.num_rows, x.shape[-1], y.shape[-1],
        pairs.tokens, pairs.starts, pairs.members,
        singles.units, singles.scales, singles.weights, singles.channels,
    )  # fmt: skip


def _add_other(y: Tensor, x: Tensor, singles: Singles) -> None:
    """Add the deltas to an output that is not compiled for, by way of float32."""
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    delta = torch.zeros(y.shape, dtype=torch.float32)
    add_singles(delta, x.to(torch.float32), singles)
    tokens = torch.from_numpy(singles.pairs.tokens)
    y.index_copy_(0, tokens, y.index_select(0, tokens).add_(delta.index_select(0, tokens)))


def _make_pairs(segments: Sequence[Segment], members: Sequence[Sequence[Member]]) -> Pairs:
    """List tokens so that threads that take equal stretches of them have equally much to read."""
    tokens: list[int] = []
    first_member: list[int] = []
    num_members: list[int] = []
    cost: list[int] = []
    first = 0
    for segment, of_segment in zip(segments, members, strict=True):
        if of_segment:
            count = len(segment.token_indices)
            tokens += segment.token_indices.tolist()
            first_member += [first] * count
            num_members += [len(of_segment)] * count
            cost += [sum(member.found.nbytes for member in of_segment)] * count
            first += len(of_segment)
    order = np.argsort(-np.array(cost), kind="stable")
    if min(cost) != max(cost):
        num_threads = torch.get_num_threads()
        order = np.concatenate([order[thread::num_threads] for thread in range(num_threads)])
    counts = np.array(num_members)[order]
    starts = np.concatenate(([0], np.cumsum(counts)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    return Pairs(np.array(tokens)[order], starts, np.repeat(np.array(first_member)[order], counts) + within)


def _in_one_memory(found: Sequence[Found]) -> Sequence[Found]:
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
    return [find_unit(unit) for unit in placed]


def _describe(unit: DeltaUnit) -> tuple[int, ...]:
    """Return a unit as `singles_kernel` reads it: where its tensors begin, then its sizes."""
    gate = unit.gate
    factors = (unit.a, unit.b, None if gate is None else gate.router, unit.inputs, unit.outputs)
    begins = (ABSENT if one is None else int(one.storage_offset()) for one in factors)
    num_inputs = unit.a.shape[1] if unit.a is not None else unit.rank
    num_outputs = unit.b.shape[1] if unit.b is not None else unit.rank
    return (
        *begins, unit.rank, num_inputs, num_outputs,
        0 if gate is None else gate.num_experts, 0 if gate is None else gate.top_k,
    )  # fmt: skip
