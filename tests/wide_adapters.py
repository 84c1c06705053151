"""A base of wide layers, few of them, and LoRAs of hundreds of megabytes for it, each tensor other than the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from architectures import build_checkpoint
from motley_adapters.peft_files import LoraPair, write_peft_lora

WIDTH, RANK = 2048, 1024
BYTES_PER_LAYER = 7 * 2 * WIDTH * RANK * 2  # seven Linears, two factors, bfloat16


def make_wide_base(directory: Path, num_layers: int) -> Path:
    """Write a random bfloat16 checkpoint whose Linears all are square and wide."""
    return build_checkpoint(
        "llama", directory, dtype=torch.bfloat16, num_hidden_layers=num_layers, hidden_size=WIDTH,
        intermediate_size=WIDTH, num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip


def wide_linears(num_layers: int) -> list[str]:
    """Return the paths of a wide base's Linears within its layers."""
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    linears = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    return [f"model.layers.{layer}.{linear}" for layer in range(num_layers) for linear in linears]


def make_wide_lora(directory: Path, num_layers: int, seed: int) -> Path:
    """Write a random bfloat16 LoRA over every Linear of a wide base."""
    # One draw serves all of them, shifted: what is measured is how bytes travel, not how they are drawn.
    drawn = torch.randn(WIDTH * RANK, generator=torch.Generator().manual_seed(seed)).mul(0.01).bfloat16()
    pairs = {
        path: LoraPair(drawn.roll(2 * place + 1).view(RANK, WIDTH), drawn.roll(2 * place + 2).view(WIDTH, RANK))
        for place, path in enumerate(wide_linears(num_layers))
    }
    write_peft_lora(directory, pairs)
    return directory
