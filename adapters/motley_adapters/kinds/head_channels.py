"""Attention heads as channels: what an S2FT adapter may name when it means whole heads.

Pure functions over counts; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from motley_bases.pruned_geometry import channels_of_heads


@dataclass(frozen=True, slots=True)
class HeadChannels:
    """The channels of some query heads, and of the key-value heads that serve no other.

    Semantics: `queries` are inputs of o_proj and outputs of q_proj. `keys_values` are outputs of k_proj and v_proj;
    under grouped queries a key-value head counts only if its whole group of query heads is chosen, since changing it
    would change the others too.
    """

    queries: tuple[int, ...]
    keys_values: tuple[int, ...]


def head_channels(num_heads: int, num_kv_heads: int, head_dim: int, heads: Iterable[int]) -> HeadChannels:
    """Return the channels of query heads, ascending.

    Raises: ValueError for heads that do not exist or come twice, or query heads that do not divide into groups.
    """
    chosen = sorted(heads)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide into {num_kv_heads} groups")
    if len(set(chosen)) != len(chosen) or (chosen and not 0 <= chosen[0] <= chosen[-1] < num_heads):
        raise ValueError(f"heads {chosen} are not distinct heads of {num_heads}")
    group = num_heads // num_kv_heads
    whole = [kv for kv in range(num_kv_heads) if set(range(kv * group, (kv + 1) * group)) <= set(chosen)]
    return HeadChannels(channels_of_heads(chosen, head_dim), channels_of_heads(whole, head_dim))
