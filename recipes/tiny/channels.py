"""Input channels of Linears that learn (S2FT): which ones, and the dense block over them.

Owns the choice of channels and the module that trains them on the base in its own order; nothing is permuted. Knows
nothing of files and text.
"""

import random

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class InputChannels(nn.Module):
    """A frozen Linear plus a dense block over some of its input channels.

    Shapes: channels [S] ascending; block [O, S], zero at first.
    """

    def __init__(self, linear: nn.Linear, channels: list[int]) -> None:
        super().__init__()
        self.linear = linear
        self.channels = torch.tensor(channels)
        self.block = nn.Parameter(torch.zeros(linear.out_features, len(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's product with the chosen channels."""
        return self.linear(x) + x[..., self.channels] @ self.block.T


def choose_heads(rng: random.Random, num_heads: int, num_kv_heads: int, head_dim: int, per_group: int) -> list[int]:
    """Choose whole query heads, equally many behind each key/value head, and list the channels of o_proj they own.

    Semantics: with grouped queries, head h reads key/value head h // (num_heads // num_kv_heads); the channels are in
    the base's own numbering, so no permutation has to be legal.
    """
    group = num_heads // num_kv_heads
    heads = sorted(kv * group + head for kv in range(num_kv_heads) for head in rng.sample(range(group), per_group))
    return [head * head_dim + place for head in heads for place in range(head_dim)]


def attach_channels(base: PreTrainedModel, seed: int, heads_per_group: int, num_ffn: int) -> dict[str, InputChannels]:
    """Let some heads of each o_proj and some channels of each down_proj learn, drawn at random; by module path."""
    config = base.config
    rng = random.Random(f"channels {seed}")
    attached: dict[str, InputChannels] = {}
    for index, layer in enumerate(base.model.layers):
        heads = choose_heads(
            rng, config.num_attention_heads, config.num_key_value_heads, config.head_dim, heads_per_group
        )
        ffn = sorted(rng.sample(range(config.intermediate_size), num_ffn))
        layer.self_attn.o_proj = attached[f"model.layers.{index}.self_attn.o_proj"] = InputChannels(
            layer.self_attn.o_proj, heads
        )
        layer.mlp.down_proj = attached[f"model.layers.{index}.mlp.down_proj"] = InputChannels(layer.mlp.down_proj, ffn)
    return attached
