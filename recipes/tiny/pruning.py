"""A physically smaller copy of the base, and the way back (LoRAM): which heads and channels stay, and who they were.

Owns random structured pruning and the scatter of a small LoRA's factors to the base's shapes. Knows nothing of files
and text.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # lose outputs
COLUMNS = ("o_proj", "down_proj")  # lose inputs


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays in each pruned layer: key/value heads with the query heads that read them, and FFN channels.

    Semantics: both ascending and in the base's own numbering; a layer that is not named stays whole.
    """

    group_size: int
    head_dim: int
    kept_kv_heads: Mapping[int, list[int]]
    kept_ffn: Mapping[int, list[int]]

    def kept(self, path: str) -> Tensor | None:
        """List the kept outputs, or for o_proj and down_proj inputs, of one Linear; None where it stays whole."""
        parts = path.split(".")
        layer, name = int(parts[parts.index("layers") + 1]), parts[-1]
        if layer not in self.kept_kv_heads:
            return None
        if name in ("gate_proj", "up_proj", "down_proj"):
            return torch.tensor(self.kept_ffn[layer])
        width = self.head_dim * (1 if name in ("k_proj", "v_proj") else self.group_size)
        return torch.tensor([kv * width + place for kv in self.kept_kv_heads[layer] for place in range(width)])


class Shares(NamedTuple):
    """How much of each pruned layer goes, and how many layers at either end stay whole."""

    heads: Fraction = Fraction(1, 2)
    ffn: Fraction = Fraction(1, 4)
    whole_first: int = 3
    whole_last: int = 2


def draw_plan(base: PreTrainedModel, shares: Shares, seed: int) -> Plan:
    """Draw what stays: all but floor(heads) of the head groups and ceil(ffn) of the FFN channels of each layer."""
    config = base.config
    rng = random.Random(f"prune {seed}")
    layers = range(shares.whole_first, config.num_hidden_layers - shares.whole_last)
    kv_heads = config.num_key_value_heads - int(config.num_key_value_heads * shares.heads)
    ffn = config.intermediate_size - ceil(config.intermediate_size * shares.ffn)
    return Plan(
        config.num_attention_heads // config.num_key_value_heads,
        config.head_dim,
        {layer: sorted(rng.sample(range(config.num_key_value_heads), kv_heads)) for layer in layers},
        {layer: sorted(rng.sample(range(config.intermediate_size), ffn)) for layer in layers},
    )


@torch.no_grad()
def prune(base: PreTrainedModel, plan: Plan) -> None:
    """Replace each pruned Linear by a smaller, frozen one that holds what stays."""
    for path, module in list(base.named_modules()):
        parent, _, name = path.rpartition(".")
        if name not in ROWS + COLUMNS or (kept := plan.kept(path)) is None:
            continue
        weight = module.weight[kept] if name in ROWS else module.weight[:, kept]
        smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        smaller.weight.copy_(weight)
        setattr(base.get_submodule(parent), name, smaller)


def recover(plan: Plan, base: PreTrainedModel, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scatter the factors of a LoRA on the pruned copy to the shapes of the base; what was pruned gets zeros.

    Semantics: `factors` by PEFT's keys; rows of lora_B for Linears that lost outputs, columns of lora_A for the others.
    """
    recovered = {}
    for key, factor in factors.items():
        path, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        loses = "lora_B" if path.endswith(ROWS) else "lora_A"
        if side != loses or (kept := plan.kept(path)) is None:
            recovered[key] = factor.contiguous()
            continue
        linear = base.get_submodule(path)
        dim, size = (0, linear.out_features) if side == "lora_B" else (1, linear.in_features)
        shape = [size, factor.shape[1]] if dim == 0 else [factor.shape[0], size]
        recovered[key] = factor.new_zeros(shape).index_copy(dim, kept, factor)
    return recovered
