"""The adapter delta by our Triton kernels: the path on CUDA, two launches a Linear and three where there are experts.

Semantics are those of `reference`. What a kernel is compiled for follows from dtypes, the Linear's width and its units,
and none of it changes the order in which one token's products and sums are taken. The engine thread runs it; its
scratch lives in the batch and in the unit table. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from motley_kernels.adapter_delta.reference import embedding_factors
from motley_kernels.adapter_delta.triton_expand import expand_kernel
from motley_kernels.adapter_delta.triton_gate import gate_kernel
from motley_kernels.adapter_delta.triton_plan import BLOCK_O, TILE_COLUMNS, Layout, UnitRows, plan_for
from motley_kernels.adapter_delta.triton_shrink import look_up_kernel, shrink_kernel
from motley_kernels.adapter_delta.types import DeltaBatch, UnitTable
from motley_kernels.launch import Launch

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
IS_INTERPRETED = not isinstance(expand_kernel, triton.JITFunction)
SPLIT_INPUTS, MAX_SPLITS = 1024, 8
"""Inputs are summed in parts of about so many, so that one small unit fills a device; a function of the width alone."""
NUM_STAGES = 3


def add_delta(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> None:
    """Add each token's adapter delta to `y`, in place; see the package's `add_delta`.

    Raises: KernelError if the factors here differ in dtype, or are wider than float32.
    """
    with torch.cuda.device_of(y):
        for launch in launches(y, x, units, batch):
            launch.run()


def add_embedding_delta(y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float) -> None:
    """Add each token's embedding delta to `y`, in place; see the package's `add_embedding_delta`."""
    with torch.cuda.device_of(y):
        for launch in embedding_launches(y, input_ids, units, batch, output_scale):
            launch.run()


def launches(y: Tensor, x: Tensor, units: UnitTable, batch: DeltaBatch) -> list[Launch]:
    """Plan what `add_delta` launches, in order."""
    plan = plan_for(units, batch, y.device)
    layout, rows = plan.layout, plan.rows
    if layout is None:
        return []
    splits = min(MAX_SPLITS, -(-units.in_features // SPLIT_INPUTS))
    hidden = torch.empty(splits, layout.hidden_size, dtype=torch.float32, device=y.device)
    planned = []
    if len(layout.shrink_tiles):
        planned.append(_shrink(x, hidden, layout, rows, units.in_features))
    if len(layout.gate_tiles):
        planned.append(_gate(hidden, layout, rows))
    return [*planned, _expand(y, x, hidden, layout, rows, 1.0)]


def embedding_launches(
    y: Tensor, input_ids: Tensor, units: UnitTable, batch: DeltaBatch, output_scale: float
) -> list[Launch]:
    """Plan what `add_embedding_delta` launches, in order."""
    for slot in batch.slots:
        if slot in units.units:
            embedding_factors(units.units[slot])
    plan = plan_for(units, batch, y.device)
    layout, rows = plan.layout, plan.rows
    if layout is None:
        return []
    hidden = torch.empty(1, layout.hidden_size, dtype=torch.float32, device=y.device)
    arguments: dict[str, Tensor | int | float] = {
        "input_ids_ptr": input_ids.contiguous(),
        "hidden_ptr": hidden,
        "units_ptr": rows.table,
        "tiles_ptr": layout.shrink_tiles,
        "tokens_ptr": layout.tokens,
    }
    constants = {"FACTOR_TYPE": TYPES[rows.dtype]}
    look_up = Launch(look_up_kernel, (len(layout.shrink_tiles),), arguments, constants, NUM_STAGES)
    return [look_up, _expand(y, y, hidden, layout, rows, output_scale)]


def _shrink(x: Tensor, hidden: Tensor, layout: Layout, rows: UnitRows, in_features: int) -> Launch:
    in_float32 = x.dtype != rows.dtype or rows.dtype == torch.float32
    arguments: dict[str, Tensor | int | float] = {
        "x_ptr": x,
        "hidden_ptr": hidden,
        "units_ptr": rows.table,
        "tiles_ptr": layout.shrink_tiles,
        "tokens_ptr": layout.tokens,
        "hidden_size": layout.hidden_size,
        "in_features": in_features,
        "x_stride": x.stride(0),
        "x_step": x.stride(1),
    }
    constants = {
        "FACTOR_TYPE": TYPES[rows.dtype],
        "BLOCK_I": 64 if in_float32 else 128,
        "SPLITS": len(hidden),
        # The interpreter's product of two bfloat16 is wrong.
        "IN_FLOAT32": in_float32 or (IS_INTERPRETED and rows.dtype == torch.bfloat16),
        "IS_ALIGNED": rows.is_aligned,
    }
    return Launch(shrink_kernel, (len(layout.shrink_tiles), len(hidden)), arguments, constants, NUM_STAGES)


def _gate(hidden: Tensor, layout: Layout, rows: UnitRows) -> Launch:
    arguments: dict[str, Tensor | int | float] = {
        "hidden_ptr": hidden,
        "units_ptr": rows.table,
        "tiles_ptr": layout.gate_tiles,
        "hidden_size": layout.hidden_size,
    }
    constants = {"BLOCK_E": max(TILE_COLUMNS, triton.next_power_of_2(rows.max_experts)), "SPLITS": len(hidden)}
    return Launch(gate_kernel, (len(layout.gate_tiles),), arguments, constants, NUM_STAGES)


def _expand(y: Tensor, x: Tensor, hidden: Tensor, layout: Layout, rows: UnitRows, output_scale: float) -> Launch:
    arguments: dict[str, Tensor | int | float] = {
        "y_ptr": y,
        "x_ptr": x,
        "hidden_ptr": hidden,
        "units_ptr": rows.table,
        "tiles_ptr": layout.expand_tiles,
        "members_ptr": layout.members,
        "weights_ptr": layout.weights,
        "tokens_ptr": layout.tokens,
        "hidden_size": layout.hidden_size,
        "out_features": y.shape[1],
        "output_scale": output_scale,
        "y_stride": y.stride(0),
        "y_step": y.stride(1),
        "x_stride": x.stride(0),
        "x_step": x.stride(1),
    }
    constants = {
        "FACTOR_TYPE": TYPES[rows.dtype],
        "SPLITS": len(hidden),
        # Products stay in float32. A factor of half its width is exact in tf32: three products then come to float32.
        "PRECISION": "ieee" if rows.dtype == torch.float32 else "tf32x3",
        "IS_ALIGNED": rows.is_aligned,
    }
    grid = (len(layout.expand_tiles), triton.cdiv(y.shape[1], BLOCK_O))
    return Launch(expand_kernel, grid, arguments, constants, NUM_STAGES)
