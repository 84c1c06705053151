"""A physically smaller copy of the base, and the way back (LoRAM): which heads and channels stay, drawn at random.

Owns the draw, the smaller model, and whose factors are scattered. What is counted and kept is the bases' pruned
geometry, and the scatter is the kind's own. Knows nothing of files and text.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from motley_adapters.kinds.loram_recovery import recover as recover_pair
from motley_adapters.peft_files import LoraPair
from motley_bases.pruned_geometry import DecoderShape, KeptChannels, PruneRule, kept_channels
from torch import Tensor, nn
from transformers import PreTrainedModel

WHOLE = KeptChannels()


@dataclass(frozen=True, slots=True)
class Plan:
    """What each Linear of each pruned layer keeps, by layer and by the Linear's name."""

    layers: Mapping[int, Mapping[str, KeptChannels]]

    def kept(self, path: str) -> KeptChannels:
        """Tell what one module of the model keeps: all of it, unless it is a Linear of a pruned layer."""
        *parents, name = path.split(".")
        layer = int(parents[parents.index("layers") + 1]) if len(parents) > 2 and "layers" in parents else None
        return WHOLE if layer is None else self.layers.get(layer, {}).get(name, WHOLE)


class Shares(NamedTuple):
    """How much of each pruned layer goes, and how many layers at either end stay whole."""

    heads: Fraction = Fraction(1, 2)
    ffn: Fraction = Fraction(1, 4)
    whole_first: int = 3
    whole_last: int = 2


def draw_plan(base: PreTrainedModel, shares: Shares, seed: int) -> Plan:
    """Draw what stays: in the layers that are pruned, so many head groups and FFN channels as the rules leave."""
    shape = _shape(base)
    rng = random.Random(f"prune {seed}")
    heads, ffn = (PruneRule(share, shares.whole_first, shares.whole_last) for share in (shares.heads, shares.ffn))
    num_kv_heads = heads.kept_kv_heads(shape.num_heads, shape.num_kv_heads)
    ffn_size = ffn.kept_ffn_size(shape.ffn_size)
    layers = heads.pruned_layers(shape.num_layers)
    kv_heads = {layer: sorted(rng.sample(range(shape.num_kv_heads), num_kv_heads)) for layer in layers}
    channels = {layer: sorted(rng.sample(range(shape.ffn_size), ffn_size)) for layer in layers}
    return Plan(
        {layer: kept_channels(shape, kv_heads=kv_heads[layer], ffn_channels=channels[layer]) for layer in layers}
    )


@torch.no_grad()
def prune(base: PreTrainedModel, plan: Plan) -> None:
    """Replace each pruned Linear by a smaller, frozen one that holds what stays."""
    for path, module in list(base.named_modules()):
        kept = plan.kept(path)
        if kept == WHOLE:
            continue
        weight = module.weight if kept.outputs is None else module.weight[list(kept.outputs)]
        weight = weight if kept.inputs is None else weight[:, list(kept.inputs)]
        smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
        smaller.weight.copy_(weight)
        parent, _, name = path.rpartition(".")
        setattr(base.get_submodule(parent), name, smaller)


def recover(plan: Plan, base: PreTrainedModel, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scatter the factors of a LoRA on the pruned copy to the shapes of the base; what was pruned gets zeros.

    Semantics: `factors` by PEFT's keys.
    """
    recovered = {}
    for key, a in factors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        key_of_b = key.replace(".lora_A.", ".lora_B.")
        linear = base.get_submodule(path)
        pair = LoraPair(a, factors[key_of_b])
        pair = recover_pair(pair, plan.kept(path), linear.in_features, linear.out_features)
        recovered |= {key: pair.a.contiguous(), key_of_b: pair.b.contiguous()}
    return recovered


def _shape(base: PreTrainedModel) -> DecoderShape:
    config = base.config
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )
