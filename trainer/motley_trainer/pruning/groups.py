"""Dependency groups in closed form: what must go together when a head or an FFN channel of a decoder goes.

Owns which rows and columns of which Linears one group is, for families whose layers are Llama's; refuses the others by
name. Knows nothing of scores and of what is worth keeping. Pure functions; any thread.
Source: LLM-Pruner, arXiv:2305.11627, section 3.1; for a Llama block the closures can be written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from motley_bases.pruned import check_prunable, decoder_shape
from motley_bases.pruned_geometry import DecoderShape
from torch import nn
from transformers import PreTrainedModel

from motley_trainer.errors import UnsuitableBaseError


class GroupKind(StrEnum):
    """What one group of a layer is: a key-value head with the query heads that read it, or an FFN channel."""

    ATTENTION = "attention"
    FFN = "ffn"


class Side(StrEnum):
    """Which side of a Linear: its outputs are the weight's rows and the bias, its inputs the weight's columns."""

    OUTPUTS = "outputs"
    INPUTS = "inputs"


@dataclass(frozen=True, slots=True)
class Member:
    """One side of one Linear, cut into groups of consecutive channels.

    Semantics: group g has channels [g * channels_per_group, (g + 1) * channels_per_group) of that side.
    """

    path: str
    side: Side
    channels_per_group: int
    num_parameters_per_group: int


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """All groups of one kind in one layer.

    Semantics: members lie in the order of the forward pass, but the root first, which is k_proj where several query
    heads read one key-value head. `head_dim` is 1 for FFN channels, which stand alone.
    """

    layer: int
    kind: GroupKind
    num_groups: int
    head_dim: int
    members: tuple[Member, ...]

    @property
    def num_parameters_per_group(self) -> int:
        """Return how many parameters go with one group."""
        return sum(member.num_parameters_per_group for member in self.members)

    @property
    def queries_per_head(self) -> int:
        """Return how many query heads read one key-value head; 1 for FFN channels."""
        return max(member.channels_per_group for member in self.members) // self.head_dim


def groups_of(model: PreTrainedModel) -> tuple[LayerGroups, ...]:
    """List the groups of a model as it is now, whole or already pruned: of each layer attention, then FFN.

    Raises: UnsupportedBaseError with reason NOT_PRUNABLE if the family's groups are not known; UnsuitableBaseError with
    reason NO_CLOSED_FORM if the modules are not what the closed form takes them for.
    """
    check_prunable(model.config)
    shape = decoder_shape(model.config)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: list[LayerGroups] = []
    for layer in range(shape.num_layers):
        sizes = {path: linears[path] for path in _paths(layer) if path in linears}
        if len(sizes) < len(_paths(layer)):
            missing = next(path for path in _paths(layer) if path not in linears)
            raise _other_modules(model, f"{missing} is not a Linear")
        num_kv_heads = sizes[f"{_attention(layer)}.k_proj"].out_features // shape.head_dim
        ffn_size = sizes[f"{_ffn(layer)}.down_proj"].in_features
        biased = frozenset(path for path, linear in sizes.items() if linear.bias is not None)
        groups = layer_groups(shape, layer, num_kv_heads=num_kv_heads, ffn_size=ffn_size, biased=biased)
        _check_sizes(model, sizes, groups)
        found += groups
    return tuple(found)


def layer_groups(
    shape: DecoderShape,
    layer: int,
    *,
    num_kv_heads: int | None = None,
    ffn_size: int | None = None,
    biased: frozenset[str] = frozenset(),
) -> tuple[LayerGroups, LayerGroups]:
    """Return the groups of one layer, attention and FFN, from arithmetic alone.

    Semantics: the numbers of key-value heads and FFN channels are the shape's unless given, as for a pruned layer;
    `biased` names the Linears that have a bias, whose rows count with their outputs.
    """
    queries_per_kv_head = shape.num_heads // shape.num_kv_heads

    def member(path: str, side: Side, channels: int) -> Member:
        bias = side is Side.OUTPUTS and path in biased
        return Member(path, side, channels, channels * (shape.hidden_size + bias))

    q, k, v, o, gate, up, down = _paths(layer)
    query = member(q, Side.OUTPUTS, queries_per_kv_head * shape.head_dim)
    key = member(k, Side.OUTPUTS, shape.head_dim)
    roots = (query, key) if queries_per_kv_head == 1 else (key, query)
    attention = (
        *roots,
        member(v, Side.OUTPUTS, shape.head_dim),
        member(o, Side.INPUTS, queries_per_kv_head * shape.head_dim),
    )
    ffn = (member(gate, Side.OUTPUTS, 1), member(up, Side.OUTPUTS, 1), member(down, Side.INPUTS, 1))
    return (
        LayerGroups(layer, GroupKind.ATTENTION, num_kv_heads or shape.num_kv_heads, shape.head_dim, attention),
        LayerGroups(layer, GroupKind.FFN, ffn_size or shape.ffn_size, 1, ffn),
    )


def _paths(layer: int) -> tuple[str, ...]:
    attention = tuple(f"{_attention(layer)}.{name}_proj" for name in ("q", "k", "v", "o"))
    return attention + tuple(f"{_ffn(layer)}.{name}_proj" for name in ("gate", "up", "down"))


def _attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def _ffn(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


def _check_sizes(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], groups: tuple[LayerGroups, LayerGroups]
) -> None:
    for of_kind in groups:
        for member in of_kind.members:
            linear = linears[member.path]
            found = linear.out_features if member.side is Side.OUTPUTS else linear.in_features
            wanted = of_kind.num_groups * member.channels_per_group
            if found != wanted:
                raise _other_modules(model, f"{member.path} has {found} {member.side}, where {wanted} belong together")


def _other_modules(model: PreTrainedModel, problem: str) -> UnsuitableBaseError:
    return UnsuitableBaseError(
        f"{type(model).__name__} cannot be pruned: {problem}", reason="NO_CLOSED_FORM", field="architectures"
    )
