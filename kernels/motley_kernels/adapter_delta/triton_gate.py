"""The kernel between shrink and expand of the adapter delta: from router logits to each expert's share.

It is launched only where a batch has units with experts, and knows pointers alone. It sums a logit's parts first to
last and adds the chosen exponentials largest first, so that no reduction's shape decides a bit. It runs on the engine
thread's stream, or in Triton's interpreter. Dimension letters: T tokens, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from motley_kernels.adapter_delta.triton_records import (
    LOGITS,
    NUM_EXPERTS,
    SHARES,
    SHRINK_FIELDS,
    TILE_TOKENS,
    TOP_K,
    UNIT_FIELDS,
    WIDTH,
)


@triton.jit(do_not_specialize=["hidden_size"])
def gate_kernel(
    hidden_ptr: tl.tensor,
    units_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    hidden_size: tl.tensor,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Write one tile's shares: the softmax of the top_k largest logits, the lower expert first among equals.

    Shapes: hidden [SPLITS, hidden_size] float32, shares with the first split; BLOCK_E at least E; grid (tiles,).
    """
    tile = tiles_ptr + tl.program_id(0) * SHRINK_FIELDS
    unit = units_ptr + tl.load(tile) * UNIT_FIELDS
    lanes = tl.arange(0, TILE_TOKENS)
    is_token = lanes < tl.load(tile + 3)
    experts = tl.arange(0, BLOCK_E)
    is_expert = experts < tl.load(unit + NUM_EXPERTS)
    is_read = is_token[:, None] & is_expert[None, :]
    rows = hidden_ptr + tl.load(tile + 4) + lanes * tl.load(unit + WIDTH)
    cells = rows[:, None] + tl.load(unit + LOGITS) + experts[None, :]
    logits = tl.load(cells, mask=is_read, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        cells += hidden_size
        logits += tl.load(cells, mask=is_read, other=0.0)
    left = tl.where(is_expert[None, :], logits, float("-inf"))
    best = tl.max(left, axis=1)
    norm = tl.zeros((TILE_TOKENS,), tl.float32)
    for _ in range(tl.load(unit + TOP_K)):
        largest = tl.max(left, axis=1)
        chosen = tl.min(tl.where(left == largest[:, None], experts[None, :], BLOCK_E), axis=1)
        norm += tl.exp(largest - best)
        left = tl.where(experts[None, :] == chosen[:, None], float("-inf"), left)
    is_chosen = is_expert[None, :] & (left == float("-inf"))
    shares = tl.where(is_chosen, tl.exp(logits - best[:, None]) / norm[:, None], 0.0)
    tl.store(rows[:, None] + tl.load(unit + SHARES) + experts[None, :], shares, mask=is_read)
