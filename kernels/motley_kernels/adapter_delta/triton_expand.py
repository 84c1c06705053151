"""The second kernel of the adapter delta: sums what a segment's units add into y.

It knows pointers alone: `triton_plan` describes units, tiles and members to it. One program owns one tile of y and
nothing else writes there, so there are no atomics, and a token's sums are taken in its set's order whatever else is in
the batch. It runs on the engine thread's stream, or in Triton's interpreter. Dimension letters: T tokens, O out, R
rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from motley_kernels.adapter_delta.triton_records import (
    BLOCK_O,
    EXPAND_FIELDS,
    INPUTS,
    MEMBER_FIELDS,
    NUM_EXPERTS,
    NUM_OUTPUTS,
    OUTPUT_STARTS,
    OUTPUTS,
    RANK,
    SCALING,
    SHARES,
    TILE_COLUMNS,
    TILE_TOKENS,
    UNIT_FIELDS,
    WIDTH,
    A,
    B,
)


@triton.jit(do_not_specialize=["hidden_size"])
def expand_kernel(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    units_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    members_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    hidden_size: tl.tensor,
    out_features: tl.tensor,
    output_scale: tl.tensor,
    y_stride: tl.tensor,
    y_step: tl.tensor,
    x_stride: tl.tensor,
    x_step: tl.tensor,
    FACTOR_TYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """Add to one tile of y everything that its segment's members add there, in the set's order.

    Semantics: y[t, o] += sum over members m of weight_m * scaling_m * output_scale * sum over r of B[r, Out(o)] *
    gate[t, r] * hidden[t, r], rounded once.
    Shapes: grid (tiles, blocks of BLOCK_O outputs). The program is the only one to write its tile.
    """
    tile = tiles_ptr + tl.program_id(0) * EXPAND_FIELDS
    lanes = tl.arange(0, TILE_TOKENS)
    is_token = lanes < tl.load(tile + 1)
    tokens = tl.load(tokens_ptr + tl.load(tile) + lanes, mask=is_token, other=0)
    place = tl.load(tile + 2) + lanes
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((TILE_TOKENS, BLOCK_O), tl.float32)
    for m in range(tl.load(tile + 3), tl.load(tile + 4)):
        unit = units_ptr + tl.load(members_ptr + m * MEMBER_FIELDS) * UNIT_FIELDS
        cells = tl.load(members_ptr + m * MEMBER_FIELDS + 1) + place * tl.load(unit + WIDTH)
        scaling = tl.load(unit + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
        delta = _unit_delta(
            unit, hidden_ptr + cells, x_ptr + tokens * x_stride, x_step, is_token, columns, hidden_size, out_features,
            FACTOR_TYPE, SPLITS, PRECISION, IS_ALIGNED,
        )  # fmt: skip
        total += delta * (tl.load(weights_ptr + m) * scaling * output_scale)
    outputs = y_ptr + tokens[:, None] * y_stride + columns[None, :] * y_step
    is_output = is_token[:, None] & (columns < out_features)[None, :]
    y = tl.load(outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(outputs, (y + total).to(y_ptr.dtype.element_ty), mask=is_output)


@triton.jit
def _unit_delta(
    unit: tl.tensor,
    hidden: tl.tensor,
    x_rows: tl.tensor,
    x_step: tl.tensor,
    is_token: tl.tensor,
    columns: tl.tensor,
    hidden_size: tl.tensor,
    out_features: tl.tensor,
    FACTOR_TYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return what one unit adds to one tile, before its scaling: [tokens, outputs] float32."""
    if tl.load(unit + OUTPUTS) == 0:
        delta = _expand_ranks(
            unit, hidden, x_rows, x_step, is_token, columns, columns < out_features, hidden_size, FACTOR_TYPE,
            SPLITS, PRECISION, IS_ALIGNED,
        )  # fmt: skip
    else:
        positions, is_written = _positions(unit, columns)
        if tl.load(unit + B) == 0:
            delta = _gated(
                unit, hidden, x_rows, x_step, is_token, positions, is_written, hidden_size, SPLITS
            )  # fmt: skip
        else:
            delta = _expand_ranks(
                unit, hidden, x_rows, x_step, is_token, positions, is_written, hidden_size, FACTOR_TYPE,
                SPLITS, PRECISION, IS_ALIGNED,
            )  # fmt: skip
    return delta


@triton.jit
def _expand_ranks(
    unit: tl.tensor,
    hidden: tl.tensor,
    x_rows: tl.tensor,
    x_step: tl.tensor,
    is_token: tl.tensor,
    positions: tl.tensor,
    is_written: tl.tensor,
    hidden_size: tl.tensor,
    FACTOR_TYPE: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return the gated products times the columns of B at these positions."""
    rank = tl.load(unit + RANK)
    b = tl.load(unit + B).to(tl.pointer_type(FACTOR_TYPE))
    num_outputs = tl.load(unit + NUM_OUTPUTS)
    if IS_ALIGNED:
        b = tl.multiple_of(b, 16)
        num_outputs = tl.multiple_of(num_outputs, 8)
    delta = tl.zeros((TILE_TOKENS, BLOCK_O), tl.float32)
    for start in range(0, rank, TILE_COLUMNS):
        ranks = start + tl.arange(0, TILE_COLUMNS)
        gated = _gated(
            unit, hidden, x_rows, x_step, is_token, ranks, ranks < rank, hidden_size, SPLITS
        )  # fmt: skip
        is_read = (ranks < rank)[:, None] & is_written[None, :]
        factor = tl.load(b + ranks[:, None] * num_outputs + positions[None, :], mask=is_read, other=0.0)
        delta = tl.dot(gated, factor.to(tl.float32), delta, input_precision=PRECISION)
    return delta


@triton.jit
def _gated(
    unit: tl.tensor,
    hidden: tl.tensor,
    x_rows: tl.tensor,
    x_step: tl.tensor,
    is_token: tl.tensor,
    ranks: tl.tensor,
    is_rank: tl.tensor,
    hidden_size: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Return the tokens' products at these ranks, times their experts' shares; 0 where `is_rank` is not.

    Semantics: of a unit without A the products are its inputs, read here and never stored.
    """
    a = tl.load(unit + A)
    is_input = tl.where(is_rank, a, 1) == 0
    is_stored = tl.where(is_rank, a, 0) != 0
    inputs = tl.load(unit + INPUTS).to(tl.pointer_type(tl.int32))
    channels = tl.load(inputs + ranks, mask=is_input, other=0).to(tl.int64)
    read = tl.load(x_rows[:, None] + channels[None, :] * x_step, mask=is_token[:, None] & is_input[None, :], other=0.0)
    cells = hidden[:, None] + ranks[None, :]
    stored = tl.load(cells, mask=is_token[:, None] & is_stored[None, :], other=0.0)
    for _ in tl.static_range(1, SPLITS):
        cells += hidden_size
        stored += tl.load(cells, mask=is_token[:, None] & is_stored[None, :], other=0.0)
    products = read.to(tl.float32) + stored
    num_experts = tl.load(unit + NUM_EXPERTS)
    is_gated = tl.where(is_rank, num_experts, 0) > 0
    experts = ranks // tl.maximum(tl.load(unit + RANK) // tl.maximum(num_experts, 1), 1)
    shares = hidden[:, None] + tl.load(unit + SHARES) + experts[None, :]
    share = tl.load(shares, mask=is_token[:, None] & is_gated[None, :], other=1.0)
    return tl.where(share == 0.0, 0.0, products) * share


@triton.jit
def _positions(unit: tl.tensor, columns: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return which of a unit's outputs each column of this tile is, and whether it is one.

    Semantics: outputs ascend, so those of a tile lie together, from OUTPUT_STARTS on.
    """
    starts = tl.load(unit + OUTPUT_STARTS).to(tl.pointer_type(tl.int32)) + tl.program_id(1)
    outputs = tl.load(unit + OUTPUTS).to(tl.pointer_type(tl.int32))
    first = tl.load(starts)
    lanes = tl.arange(0, BLOCK_O)
    channels = tl.load(outputs + first + lanes, mask=first + lanes < tl.load(starts + 1), other=-1)
    is_same = columns[:, None] == channels[None, :]
    place = tl.sum(tl.where(is_same, lanes[None, :] + 1, 0), axis=1)
    return first + place - 1, place > 0
