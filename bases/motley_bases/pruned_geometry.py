"""Which channels a pruned copy of a base keeps, and how many parameters that leaves: LoRAM's rules of counting.

Numbers and indices alone: no tensors, no model, no choice of what is worth keeping. Ratios are exact fractions, because
40 * (1 - 0.65) in floating point is not 14. Pure functions; any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of a dense decoder whose layers are all alike."""

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class PruneRule:
    """How much of each layer goes, and which layers are left whole.

    Semantics: `ratio` is of the heads and FFN channels of a pruned layer, not of the model. The first
    `num_first_whole` and the last `num_last_whole` layers, embeddings, norms and lm_head are never pruned.
    """

    ratio: Fraction
    num_first_whole: int = 4
    num_last_whole: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ValueError(f"a ratio of {self.ratio} is not in [0, 1)")

    def kept_ffn_size(self, ffn_size: int) -> int:
        """Return how many FFN channels a pruned layer keeps: what goes is rounded up."""
        return ffn_size - math.ceil(ffn_size * self.ratio)

    def kept_kv_heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return how many key-value heads a pruned layer keeps.

        Semantics: under grouped queries what goes is rounded down; with a key-value head per query head, what stays is.
        """
        if num_heads == num_kv_heads:
            return math.floor(num_heads * (1 - self.ratio))
        return num_kv_heads - math.floor(num_kv_heads * self.ratio)

    def pruned_layers(self, num_layers: int) -> range:
        """Return the layers that are pruned."""
        return range(self.num_first_whole, max(self.num_first_whole, num_layers - self.num_last_whole))


@dataclass(frozen=True, slots=True)
class KeptChannels:
    """The channels of one Linear that stay, ascending, in the original's numbers; None is all of them."""

    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None


def exact_ratio(ratio: float | str | Fraction) -> Fraction:
    """Return the ratio that was written: 0.65 is 13/20, not the nearest binary fraction."""
    return ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))


def num_parameters(shape: DecoderShape, rule: PruneRule | None = None) -> int:
    """Return how many parameters a decoder has, or its pruned copy under a rule.

    Semantics: no biases; embedding and lm_head are two weights.
    """
    whole = _layer_parameters(shape, shape.ffn_size, shape.num_heads, shape.num_kv_heads)
    around = 2 * shape.vocab_size * shape.hidden_size + shape.hidden_size
    if rule is None:
        return shape.num_layers * whole + around
    kv_heads = rule.kept_kv_heads(shape.num_heads, shape.num_kv_heads)
    heads = kv_heads * (shape.num_heads // shape.num_kv_heads)
    pruned = _layer_parameters(shape, rule.kept_ffn_size(shape.ffn_size), heads, kv_heads)
    num_pruned = len(rule.pruned_layers(shape.num_layers))
    return (shape.num_layers - num_pruned) * whole + num_pruned * pruned + around


def channels_of_heads(heads: Iterable[int], head_dim: int) -> tuple[int, ...]:
    """Return the channels of whole heads, in the order of the heads."""
    return tuple(head * head_dim + channel for head in heads for channel in range(head_dim))


def query_heads(kv_heads: Iterable[int], queries_per_kv_head: int) -> tuple[int, ...]:
    """Return the query heads that read given key-value heads."""
    return channels_of_heads(kv_heads, queries_per_kv_head)  # a group is consecutive heads, as a head is channels


def kept_channels(
    shape: DecoderShape, *, kv_heads: Iterable[int], ffn_channels: Iterable[int]
) -> Mapping[str, KeptChannels]:
    """Return what each Linear of a layer keeps, by its name, given the key-value heads and FFN channels that stay.

    Raises: ValueError for heads or channels that are out of range, repeated, unsorted or none.
    """
    kv_kept = _checked("kv_heads", tuple(kv_heads), shape.num_kv_heads)
    ffn = _checked("ffn_channels", tuple(ffn_channels), shape.ffn_size)
    queries = channels_of_heads(query_heads(kv_kept, shape.num_heads // shape.num_kv_heads), shape.head_dim)
    keys = channels_of_heads(kv_kept, shape.head_dim)
    return {
        "q_proj": KeptChannels(outputs=queries),
        "k_proj": KeptChannels(outputs=keys),
        "v_proj": KeptChannels(outputs=keys),
        "o_proj": KeptChannels(inputs=queries),
        "gate_proj": KeptChannels(outputs=ffn),
        "up_proj": KeptChannels(outputs=ffn),
        "down_proj": KeptChannels(inputs=ffn),
    }


def _layer_parameters(shape: DecoderShape, ffn_size: int, num_heads: int, num_kv_heads: int) -> int:
    attention = 2 * shape.hidden_size * shape.head_dim * (num_heads + num_kv_heads)
    return attention + 3 * shape.hidden_size * ffn_size + 2 * shape.hidden_size


def _checked(name: str, kept: tuple[int, ...], num_channels: int) -> tuple[int, ...]:
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= num_channels:
        raise ValueError(f"{name} must ascend without repetition below {num_channels}, and be at least one")
    return kept
