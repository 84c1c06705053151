"""Places: where in memory the factors of units lie, and so which rows and channels a layout means at one Linear.

It knows units and layouts, not batches; it reads addresses, never weights, except where a factor has to be copied. The
engine thread calls it when a composition changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from motley_kernels.adapter_delta.layout import ALL, Channels, Factor, Form, Rows
from motley_kernels.adapter_delta.types import DeltaUnit


@dataclass(frozen=True, eq=False, slots=True)
class Found:
    """A unit looked at once: its form, and the first row of each factor in the memory at `address`.

    Semantics: `address` is None if the factors do not lie in one memory, in float32 and at whole rows of their own.
    """

    unit: DeltaUnit
    form: Form
    factors: dict[Factor, Tensor]
    address: int | None
    first_rows: dict[Factor, int]


def find_unit(unit: DeltaUnit) -> Found | None:
    """Look at a unit; None if it has nothing to read, to write or between, and so adds nothing."""
    if not all(tensor.numel() for tensor in unit.tensors):
        return None
    gate = unit.gate
    named: tuple[tuple[Factor, Tensor | None], ...] = (
        ("a", unit.a),
        ("b", unit.b),
        ("router", None if gate is None else gate.router),
    )
    factors = {name: factor for name, factor in named if factor is not None}
    addresses = {factor.untyped_storage().data_ptr() for factor in factors.values()}
    is_rows = all(
        factor.dtype == torch.float32 and factor.is_contiguous() and factor.storage_offset() % factor.shape[1] == 0
        for factor in factors.values()
    )
    form = Form(
        rank=unit.rank,
        has_a=unit.a is not None,
        has_b=unit.b is not None,
        num_inputs=ALL if unit.inputs is None else len(unit.inputs),
        num_outputs=ALL if unit.outputs is None else len(unit.outputs),
        num_experts=0 if gate is None else gate.num_experts,
        top_k=0 if gate is None else gate.top_k,
    )
    return Found(
        unit=unit,
        form=form,
        factors=factors,
        address=addresses.pop() if len(addresses) == 1 and is_rows else None,
        first_rows={name: factor.storage_offset() // factor.shape[1] for name, factor in factors.items()},
    )


def find_rows(found: Mapping[int, Found], rows: Rows) -> tuple[Tensor, Tensor]:
    """Return memory as rows of one width, and which of them are meant, int32.

    Semantics: where all units lie in one memory at whole rows, as a UnitPool places them, it is that memory. Otherwise
    it is a copy of the factors.
    """
    addresses = {found[slot].address for slot, _ in rows.factors}
    if len(addresses) == 1 and None not in addresses:
        slot, name = rows.factors[0]
        factor = found[slot].factors[name]
        num_rows = factor.untyped_storage().nbytes() // factor.itemsize // rows.width
        memory = factor.as_strided((num_rows, rows.width), (rows.width, 1), 0)
        return memory, rows.indices(np.array([found[slot].first_rows[name] for slot, name in rows.factors]))
    memory = torch.cat([found[slot].factors[name].to(torch.float32) for slot, name in rows.factors])
    lengths = np.array([len(found[slot].factors[name]) for slot, name in rows.factors])
    return memory, rows.indices(np.cumsum(lengths) - lengths)


def find_channels(found: Mapping[int, Found], channels: Channels, side: Literal["inputs", "outputs"]) -> Tensor:
    """Return which elements of flattened token rows are meant, int64."""
    units = [found[slot].unit for slot in channels.slots]
    given = [unit.inputs if side == "inputs" else unit.outputs for unit in units]
    return channels.indices([one for one in given if one is not None])
