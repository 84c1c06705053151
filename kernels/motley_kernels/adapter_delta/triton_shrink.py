"""The first kernel of the adapter delta: every unit's products with its tokens' inputs, into a scratch.

It knows pointers alone: `triton_plan` describes units and tiles to it. No atomics: every cell of the scratch is written
once, and the inputs are split as their number says and never as the batch does. It runs on the engine thread's
stream, or in Triton's interpreter. Dimension letters: T tokens, I in, R rank, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from motley_kernels.adapter_delta.triton_records import (
    INPUTS,
    LOGITS,
    NUM_EXPERTS,
    NUM_INPUTS,
    RANK,
    ROUTER,
    SHRINK_FIELDS,
    TILE_COLUMNS,
    TILE_TOKENS,
    UNIT_FIELDS,
    WIDTH,
    A,
)


@triton.jit(do_not_specialize=["hidden_size", "in_features"])
def shrink_kernel(
    x_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    units_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    hidden_size: tl.tensor,
    in_features: tl.tensor,
    x_stride: tl.tensor,
    x_step: tl.tensor,
    FACTOR_TYPE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPLITS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """Write one tile's share of the products A x, or of a router's logits, along one part of the inputs.

    Semantics: hidden[split, cell of token t, column c] = sum over the split's inputs i of A[c, i] * x[t, In(i)].
    Shapes: hidden [SPLITS, hidden_size] float32; grid (tiles, SPLITS). Every cell that expand reads is written.
    """
    tile = tiles_ptr + tl.program_id(0) * SHRINK_FIELDS
    split = tl.program_id(1)
    unit = units_ptr + tl.load(tile) * UNIT_FIELDS
    first_column = tl.load(tile + 1)
    lanes = tl.arange(0, TILE_TOKENS)
    is_token = lanes < tl.load(tile + 3)
    tokens = tl.load(tokens_ptr + tl.load(tile + 2) + lanes, mask=is_token, other=0)
    x_rows = x_ptr + tokens * x_stride
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    logits = tl.load(unit + LOGITS)
    num_inputs = tl.load(unit + NUM_INPUTS)
    inputs = tl.load(unit + INPUTS).to(tl.pointer_type(tl.int32))
    a = tl.load(unit + A).to(tl.pointer_type(FACTOR_TYPE))
    rank = tl.load(unit + RANK)
    if first_column >= logits:
        router = tl.load(unit + ROUTER).to(tl.pointer_type(tl.float32))
        experts = tl.load(unit + NUM_EXPERTS)
        products = _products(
            x_rows, x_step, is_token, router, columns - logits, experts, in_features, inputs, split,
            False, BLOCK_I, SPLITS, True, IS_ALIGNED,
        )  # fmt: skip
    elif tl.load(unit + INPUTS) != 0:
        products = _products(
            x_rows, x_step, is_token, a, columns, rank, num_inputs, inputs, split,
            True, BLOCK_I, SPLITS, IN_FLOAT32, IS_ALIGNED,
        )  # fmt: skip
    else:
        products = _products(
            x_rows, x_step, is_token, a, columns, rank, num_inputs, inputs, split,
            False, BLOCK_I, SPLITS, IN_FLOAT32, IS_ALIGNED,
        )  # fmt: skip
    cells = hidden_ptr + split.to(tl.int64) * hidden_size + tl.load(tile + 4) + lanes * tl.load(unit + WIDTH)
    tl.store(cells[:, None] + columns[None, :], products, mask=is_token[:, None])


@triton.jit
def _products(
    x_rows: tl.tensor,
    x_step: tl.tensor,
    is_token: tl.tensor,
    weights: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.tensor,
    length: tl.tensor,
    inputs: tl.tensor,
    split: tl.tensor,
    GATHERS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPLITS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return rows [num_rows, length] times the tokens' inputs, over one of SPLITS equal parts of the length."""
    part = tl.cdiv(tl.cdiv(length, BLOCK_I), SPLITS) * BLOCK_I
    begin = split * part
    end = tl.minimum(begin + part, length)
    if IS_ALIGNED:
        weights = tl.multiple_of(weights, 16)
        length = tl.multiple_of(length, 8)
        end = tl.multiple_of(end, 8)
    products = tl.zeros((TILE_TOKENS, TILE_COLUMNS), tl.float32)
    for start in range(begin, end, BLOCK_I):
        channels = start + tl.arange(0, BLOCK_I)
        is_channel = channels < end
        columns = channels
        if GATHERS:
            columns = tl.load(inputs + channels, mask=is_channel, other=0).to(channels.dtype)
        x = tl.load(
            x_rows[:, None] + columns[None, :] * x_step, mask=is_token[:, None] & is_channel[None, :], other=0.0
        )
        weight = tl.load(
            weights + rows[None, :] * length + channels[:, None],
            mask=(rows < num_rows)[None, :] & is_channel[:, None],
            other=0.0,
        )
        if IN_FLOAT32:
            products = tl.dot(x.to(tl.float32), weight.to(tl.float32), products, input_precision="ieee")
        else:
            products = tl.dot(x, weight, products)
    return products


@triton.jit
def look_up_kernel(
    input_ids_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    units_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    FACTOR_TYPE: tl.constexpr,
) -> None:
    """Write one tile's columns of A at the tokens' ids: what shrink is where inputs are one-hot.

    Shapes: input_ids [T]; hidden [1, hidden_size] float32; grid (tiles,).
    """
    tile = tiles_ptr + tl.program_id(0) * SHRINK_FIELDS
    unit = units_ptr + tl.load(tile) * UNIT_FIELDS
    lanes = tl.arange(0, TILE_TOKENS)
    is_token = lanes < tl.load(tile + 3)
    tokens = tl.load(tokens_ptr + tl.load(tile + 2) + lanes, mask=is_token, other=0)
    ids = tl.load(input_ids_ptr + tokens, mask=is_token, other=0)
    columns = tl.load(tile + 1) + tl.arange(0, TILE_COLUMNS)
    a = tl.load(unit + A).to(tl.pointer_type(FACTOR_TYPE))
    is_read = is_token[:, None] & (columns < tl.load(unit + RANK))[None, :]
    products = tl.load(a + columns[None, :] * tl.load(unit + NUM_INPUTS) + ids[:, None], mask=is_read, other=0.0)
    cells = hidden_ptr + tl.load(tile + 4) + lanes * tl.load(unit + WIDTH)
    tl.store(cells[:, None] + columns[None, :], products.to(tl.float32), mask=is_token[:, None])
