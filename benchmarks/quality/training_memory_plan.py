"""What the memory of training is measured of: a base, a batch, the methods; and what formulas say that each takes.

The formulas are S2FT's own (arXiv:2412.06289, section 3.3) and the same counting for LoRA and full fine-tuning: bytes
of what is trained, its gradients and the optimizer's moments, and what the Linears keep for the backward pass. What
other operations keep is the same for all, and not predicted. Owns numbers alone; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS, HIDDEN, FFN, VOCABULARY = 12, 512, 1408, 4096
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
ROWS, LENGTH = 4, 128
STEPS = 3

# A rank of 8 on all Linears has as many numbers as one head and 82 channels in each layer: 897,024.
RANK = 8
O_SHARE, DOWN_SHARE = 0.125, 0.0583  # rounded down to whole heads and channels
NUM_HEADS, NUM_CHANNELS = 1, 82

FULL, LORA, S2FT, FROZEN = "full fine-tuning", "LoRA", "S2FT", "nothing"
BYTES = {"float32": 4, "bfloat16": 2}
BLOCK_BYTES = 4  # factors and blocks are float32 on every base


@dataclass(frozen=True, slots=True)
class Cell:
    """What is trained, and how the base beneath is held."""

    method: str
    dtype: str = "float32"
    quantization: str = "none"


CELLS = (
    *(Cell(method) for method in (FULL, LORA, S2FT, FROZEN)),
    *(Cell(method, "bfloat16") for method in (FULL, LORA, S2FT, FROZEN)),
    *(Cell(method, "bfloat16", "nf4") for method in (LORA, S2FT, FROZEN)),
)


def num_linear_weights() -> int:
    """Return how many weights the Linears of the layers have."""
    attention = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    return LAYERS * (attention + 3 * HIDDEN * FFN)


def num_trained(cell: Cell) -> int:
    """Return how many numbers are trained."""
    if cell.method == FULL:
        return num_linear_weights() + VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # the head is the embedding
    if cell.method == LORA:
        attention = 2 * (HIDDEN + HEADS * HEAD_DIM) + 2 * (HIDDEN + KV_HEADS * HEAD_DIM)
        return LAYERS * RANK * (attention + 3 * (HIDDEN + FFN))
    return LAYERS * HIDDEN * num_channels() if cell.method == S2FT else 0


def num_channels() -> int:
    """Return how many channels S2FT trains in a layer."""
    return NUM_HEADS * HEAD_DIM + NUM_CHANNELS


def state_bytes(cell: Cell) -> int:
    """Return what is trained, its gradients and AdamW's two moments take: P (b_w + b_g + 2 b_m)."""
    return num_trained(cell) * 4 * (BYTES[cell.dtype] if cell.method == FULL else BLOCK_BYTES)


def kept_bytes(cell: Cell) -> int:
    """Return what the Linears keep for the backward pass.

    Semantics: S2FT's keep T s b of a layer. LoRA's and full fine-tuning's keep their inputs, once where several read
    the same: q, k and v; gate and up. A LoRA keeps what lies between its factors besides, in float32; full fine-tuning
    the input of the head, of those tokens that have one after them.
    """
    tokens, size = ROWS * LENGTH, BYTES[cell.dtype]
    inputs = LAYERS * tokens * (HIDDEN + HEADS * HEAD_DIM + HIDDEN + FFN) * size
    if cell.method == FULL:
        return inputs + ROWS * (LENGTH - 1) * HIDDEN * size
    if cell.method == LORA:
        return inputs + LAYERS * tokens * 7 * RANK * BLOCK_BYTES
    return LAYERS * tokens * num_channels() * size if cell.method == S2FT else 0
