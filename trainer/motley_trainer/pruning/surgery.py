"""Surgery: take rows and columns out of a model's Linears, for good.

Owns what becomes of weights and biases, and how the sizes that are left are told. Chooses nothing. Runs on the thread
that owns the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from motley_bases.pruned import LayerShape, PrunedShapes, decoder_shape
from motley_bases.pruned_geometry import channels_of_heads
from torch import nn
from transformers import PreTrainedModel

from motley_trainer.pruning.groups import GroupKind, Side, groups_of
from motley_trainer.pruning.selection import Key


@torch.no_grad()
def shrink(model: PreTrainedModel, kept: Mapping[Key, Sequence[int]]) -> None:
    """Take out of a model every group of the named layers and kinds that is not kept.

    Semantics: `kept` ascends, in the numbers that the groups have in this model. A bias goes with the outputs that it
    belongs to; that of o_proj and down_proj stays whole. Nothing makes up for what is gone.
    Effects: replaces the model's Linears; the config keeps the original's numbers, as the format of pruned bases does.
    Raises: ValueError for groups that are out of range, repeated, unsorted or none.
    """
    for groups in groups_of(model):
        indices = kept.get((groups.layer, groups.kind))
        if indices is None or len(indices) == groups.num_groups:
            continue
        if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= groups.num_groups:
            raise ValueError(f"{groups.kind} groups of layer {groups.layer} must ascend below {groups.num_groups}")
        for member in groups.members:
            channels = channels_of_heads(indices, member.channels_per_group)
            linear = model.get_submodule(member.path)
            assert isinstance(linear, nn.Linear)  # groups_of has looked
            model.set_submodule(member.path, keep_channels(linear, member.side, channels))


def keep_channels(linear: nn.Linear, side: Side, channels: Sequence[int]) -> nn.Linear:
    """Return a smaller Linear with some channels of one side, in the order given."""
    index = torch.tensor(channels, device=linear.weight.device)
    weight = linear.weight.detach().index_select(0 if side is Side.OUTPUTS else 1, index)
    smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    smaller.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        bias = linear.bias.detach()
        bias = bias.index_select(0, index) if side is Side.OUTPUTS else bias.clone()
        smaller.bias = nn.Parameter(bias, requires_grad=False)
    return smaller.train(linear.training)


def shapes_of(model: PreTrainedModel) -> PrunedShapes:
    """Return the sizes of a model's layers as they are now."""
    shape = decoder_shape(model.config)
    queries_per_kv_head = shape.num_heads // shape.num_kv_heads
    counts = {(groups.layer, groups.kind): groups.num_groups for groups in groups_of(model)}
    kv_heads = [counts[layer, GroupKind.ATTENTION] for layer in range(shape.num_layers)]
    return PrunedShapes(
        tuple(
            LayerShape(num * queries_per_kv_head, num, counts[layer, GroupKind.FFN])
            for layer, num in enumerate(kv_heads)
        )
    )


def num_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
