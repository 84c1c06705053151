"""One small adapter of every kind for a random checkpoint, and the weighted sets of them that tests ask for by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from kind_adapters import layer_linears, make_goat, make_loram
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from motley_bases.loader import load_base
from motley_bases.spec import BaseSpec
from peft_adapters import make_adapter

OUTPUT_SIDE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
INPUT_SIDE = ("o_proj", "down_proj")
HEADED = ("q_proj", "k_proj", "v_proj", "o_proj")

KINDS = {
    "lora": "lora",
    "loram": "loram",
    "s2ft heads": "s2ft",
    "s2ft heads too": "s2ft",
    "s2ft outputs": "s2ft",
    "goat": "goat",
    "goat twin": "goat",
    "lora wide": "lora",
}
"""The adapters, and the kind of each: as many as one request may name."""

SETS: dict[str, tuple[tuple[str, float], ...]] = {
    "base": (),
    **{name: ((name, 1.0),) for name in ("lora", "loram", "s2ft heads", "s2ft outputs", "goat")},
    "lora and heads": (("lora", 0.7), ("s2ft heads", -0.5)),
    "outputs and goat": (("s2ft outputs", 1.0), ("goat", 0.8)),
    "one of each": (("lora", 0.5), ("loram", -0.75), ("s2ft outputs", 0.5), ("goat", 1.25)),
    "overlapping heads": (("s2ft heads", 1.0), ("s2ft heads too", 0.6)),
    "two goats": (("goat", 0.5), ("goat twin", 1.0)),
    "goats against each other": (("goat", 0.75), ("goat twin", -0.75)),
    "eight": tuple((name, 0.2 + 0.1 * place) for place, name in enumerate(KINDS)),
}
"""The weighted sets, by name."""


def make_kinds(checkpoint: Path, root: Path) -> dict[str, Path]:
    """Write a directory for each of KINDS and return them by name."""
    base = load_base(checkpoint, dtype="float32", device=torch.device("cpu"))
    config = json.loads((checkpoint / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "lora": make_adapter(checkpoint, root / "lora", seed=1),
        "lora wide": make_adapter(checkpoint, root / "lora-wide", seed=2, r=17, lora_alpha=17, strength=0.3),
        "loram": make_loram(root / "loram", base.spec, seed=3, rank=5),
        "s2ft heads": _make_s2ft(base.spec, root / "heads", INPUT_SIDE, head_dim, seed=4),
        "s2ft heads too": _make_s2ft(base.spec, root / "heads-too", INPUT_SIDE, head_dim, seed=5),
        "s2ft outputs": _make_s2ft(base.spec, root / "outputs", OUTPUT_SIDE, head_dim, seed=6),
        "goat": make_goat(root / "goat", base.tensor, base.spec, seed=7),
        "goat twin": make_goat(root / "goat-twin", base.tensor, base.spec, seed=8),
    }


def _make_s2ft(base: BaseSpec, directory: Path, linears: Sequence[str], head_dim: int, *, seed: int) -> Path:
    """Write blocks for whole heads and for channels drawn by the seed; the first of each is in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for path in layer_linears(base, linears):
        linear = path.rpartition(".")[2]
        inputs, outputs = base.linears[path]
        is_input = linear in INPUT_SIDE
        width = head_dim if linear in HEADED else 1
        num_groups = (inputs if is_input else outputs) // width
        drawn = 1 + torch.randperm(num_groups - 1, generator=generator)[: max(1, num_groups // 5)]
        groups = torch.cat([torch.zeros(1, dtype=torch.long), drawn]).sort().values
        channels = (groups[:, None] * width + torch.arange(width)).flatten().to(torch.int32)
        shape = (outputs, len(channels)) if is_input else (len(channels), inputs)
        weight = torch.randn(shape, generator=generator) * (0.6 / shape[1]) ** 0.5
        blocks[path] = ChannelBlock("input" if is_input else "output", channels, weight)
    write_s2ft(directory, base, blocks)
    return directory
