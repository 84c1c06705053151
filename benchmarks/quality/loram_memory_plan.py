"""What the memory of LoRAM is measured of: a base and its copy without a half, and what formulas say that each takes.

Base, batch and rank are those that the memory of training is measured of. Bytes of weights are P b_w, in NF4 those of
4-bit weights with doubly quantized scales; the rest is counted as of any LoRA, with a copy's own widths. Owns numbers
alone; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from training_memory_plan import (
    BLOCK_BYTES,
    BYTES,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    LENGTH,
    LORA,
    RANK,
    ROWS,
    VOCABULARY,
)
from training_memory_plan import Cell as Training

RATIO = "1/2"  # of heads and channels, in every layer, so that a half of all Linears goes
NF4 = "nf4"
NF4_BLOCK, NF4_OUTER_BLOCK, NF4_TABLE_NUMBERS = 64, 256, 16 + 256 + 1  # weights of a scale, scales of an outer one


@dataclass(frozen=True, slots=True)
class Cell:
    """A LoRA on the base or on its copy, and how what is trained on is held."""

    is_copy: bool
    dtype: str = "float32"
    quantization: str = "none"

    @property
    def training(self) -> Training:
        """Return how it is trained, which is as any LoRA is."""
        return Training(LORA, self.dtype, self.quantization)

    @property
    def name(self) -> str:
        """Name it as papers do."""
        return f"{'Q' if self.quantization == NF4 else ''}{'LoRAM' if self.is_copy else 'LoRA'}"


CELLS = (
    Cell(is_copy=False),
    Cell(is_copy=True),
    Cell(is_copy=False, dtype="bfloat16"),
    Cell(is_copy=True, dtype="bfloat16"),
    Cell(is_copy=True, dtype="bfloat16", quantization=NF4),
)


def linears(cell: Cell) -> tuple[tuple[int, int], ...]:
    """Return the (in, out) of a layer's Linears."""
    share = 2 if cell.is_copy else 1
    queries, keys, ffn = HEADS // share * HEAD_DIM, KV_HEADS // share * HEAD_DIM, FFN // share
    attention = ((HIDDEN, queries), (HIDDEN, keys), (HIDDEN, keys), (queries, HIDDEN))
    return (*attention, (HIDDEN, ffn), (HIDDEN, ffn), (ffn, HIDDEN))


def num_parameters(cell: Cell) -> int:
    """Return how many weights there are; the head is the embedding."""
    return LAYERS * sum(i * o for i, o in linears(cell)) + _num_others()


def weight_bytes(cell: Cell) -> int:
    """Return what the weights take."""
    if cell.quantization != NF4:
        return num_parameters(cell) * BYTES[cell.dtype]
    return LAYERS * sum(_nf4_bytes(i * o) for i, o in linears(cell)) + _num_others() * BYTES[cell.dtype]


def num_trained(cell: Cell) -> int:
    """Return how many numbers are trained."""
    return LAYERS * RANK * sum(i + o for i, o in linears(cell))


def state_bytes(cell: Cell) -> int:
    """Return what is trained, its gradients and AdamW's two moments take."""
    return num_trained(cell) * 4 * BLOCK_BYTES


def kept_bytes(cell: Cell) -> int:
    """Return what the Linears keep for the backward pass: what each reads, once where several do, and T r between."""
    read = [i for place, (i, _) in enumerate(linears(cell)) if place not in (1, 2, 5)]  # k and v read what q does
    tokens = ROWS * LENGTH
    return LAYERS * tokens * (sum(read) * BYTES[cell.dtype] + len(linears(cell)) * RANK * BLOCK_BYTES)


def _num_others() -> int:
    return VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN


def _nf4_bytes(num_weights: int) -> int:
    num_scales = -(-num_weights // NF4_BLOCK)
    return num_weights // 2 + num_scales + 4 * (-(-num_scales // NF4_OUTER_BLOCK) + NF4_TABLE_NUMBERS)
