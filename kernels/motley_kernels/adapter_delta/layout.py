"""Layouts: in which order a batch's (token, member) pairs are multiplied, gathered and summed.

A layout is derived from the batch and from how its units are shaped, never from where they lie or which channels they
name, so Linears of one structure share one; it holds no weights. Single tokens alone have a place in it. Functions of
integers in numpy plus the index tensors they make; the engine thread calls them when a composition changes, not on each
step. Dimension letters: N single tokens with a unit here, K products (one for each row of a unit that a token needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from motley_kernels.adapter_delta.types import Segment

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
Factor = Literal["a", "b", "router"]

ALL = -1
"""In place of a number of channels: every channel of that side, and no list of them."""


class Form(NamedTuple):
    """What a layout must know of a unit."""

    rank: int
    has_a: bool
    has_b: bool
    num_inputs: int  # or ALL
    num_outputs: int  # or ALL
    num_experts: int  # 0 without a gate
    top_k: int


class Member(NamedTuple):
    """One member of a set at a Linear where it has a unit."""

    slot: int
    scale: float  # weight * scaling
    form: Form


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Rows of several factors, given by slot and name: the k-th is row `within[k]` of `factors[factor_of[k]]`."""

    width: int
    factors: tuple[tuple[int, Factor], ...]
    factor_of: Indices
    within: Indices

    def indices(self, first_rows: Indices) -> Tensor:
        """Return which rows of the memory these are, given where each factor begins, int32."""
        return torch.from_numpy((first_rows[self.factor_of] + self.within).astype(np.int32))


@dataclass(frozen=True, eq=False, slots=True)
class Channels:
    """Elements of token rows at the channels of several units: the k-th is `bases[k]` + concatenated[`picks[k]`]."""

    slots: tuple[int, ...]  # whose channels are concatenated
    picks: Indices
    bases: Indices

    def indices(self, channels: Sequence[Tensor]) -> Tensor:
        """Return which elements of the flattened rows these are, given the slots' channels, int64."""
        return torch.from_numpy(self.bases + np.concatenate([one.numpy() for one in channels])[self.picks])


@dataclass(frozen=True, eq=False, slots=True)
class Shrink:
    """One product of inputs with rows: input row n with the rows [offsets[n], offsets[n + 1]).

    Semantics: inputs are the tokens themselves, or their gathered `channels`. `products` [k] float32 is where they go.
    """

    rows: Rows
    channels: Channels | None
    offsets: Tensor
    products: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Gates:
    """The routing of every (token, gated unit): where its logits lie among the products, and where its shares go.

    Shapes: logits [G * E], with E the most experts of any; padding [G, E] True past the unit's own, None without such;
    beyond [G, E] True from the unit's top_k on; shares [G * E + 1] float32, the last of which is 1 for those ungated;
    by_expert [G, E] the others.
    """

    logits: Tensor
    padding: Tensor | None
    beyond: Tensor
    shares: Tensor
    by_expert: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Expand:
    """One way for products to become outputs.

    Semantics: the products `takes` (None is all, in order) are multiplied by `scales` and by the gates' `shares` (None
    is without); each weighs one of `rows`, whose sums over [offsets[j], offsets[j + 1]) are the outputs; without rows
    the products are the outputs. They go to `channels` of the tokens; without, sum j is the whole of token j.
    """

    takes: Tensor | None
    scales: Tensor
    shares: Tensor | None
    rows: Rows | None
    offsets: Tensor
    channels: Channels | None


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """The single tokens of a batch at Linears of one structure.

    Semantics: products are those of `shrinks`, one after another, then the inputs at `copies`, for units without an a.
    The expand to whole tokens, if there is one, comes first. `targets` are the tokens, ascending, `span` the range that
    they fill, None if they are scattered; `is_whole` says that they are all of the batch.
    """

    num_tokens: int
    targets: Tensor
    span: tuple[int, int] | None
    is_whole: bool
    shrinks: tuple[Shrink, ...]
    copies: Channels | None
    gates: Gates | None
    expands: tuple[Expand, ...]


def make_layout(
    segments: Sequence[Segment], members: Sequence[tuple[Member, ...]], num_tokens: int, sides: tuple[int, int]
) -> Layout:
    """Lay out the single tokens, given each segment's members in the set's order, none of them for a run.

    Shapes: num_tokens and sides are those of the whole batch and of the Linear: T, (I, O).
    """
    items = _Items.of(segments, members)
    shrinks, copies = _lay_shrinks(items, sides[0])
    gates = _lay_gates(items)
    expands = _lay_expands(items, gates, sides[1])
    first, stop = int(items.tokens[0]), int(items.tokens[-1]) + 1
    is_span = stop - first == len(items.tokens)
    return Layout(
        num_tokens=len(items.tokens),
        targets=torch.from_numpy(items.tokens),
        span=(first, stop) if is_span else None,
        is_whole=len(items.tokens) == num_tokens,
        shrinks=shrinks,
        copies=copies,
        gates=gates,
        expands=expands,
    )


class _Items:
    """The (token, member) pairs in order of tokens and then of the set, as columns.

    `row` is the token's place among `tokens`; `product` and `logit`, filled in on the way, where the item's products
    and router logits begin.
    """

    def __init__(self, members: list[Member], tokens: Indices, member: Indices) -> None:
        order = np.argsort(tokens, kind="stable")
        self.tokens, self.row = np.unique(tokens[order], return_inverse=True)
        member = member[order]
        columns = np.array([one.form for one in members], dtype=np.int64)[member].T
        self.rank, self.has_a, self.has_b, self.num_inputs, self.num_outputs, self.num_experts, self.top_k = columns
        self.scale = np.array([one.scale for one in members], dtype=np.float32)[member]
        self.slots, slot_of = np.unique([one.slot for one in members], return_inverse=True)
        self.slot = slot_of[member]
        self.product = np.zeros_like(self.row)
        self.logit = np.zeros_like(self.row)
        self.num_products = 0

    @classmethod
    def of(cls, segments: Sequence[Segment], members: Sequence[tuple[Member, ...]]) -> _Items:
        """Pair the segments' tokens with their members."""
        flat: list[Member] = []
        tokens: list[int] = []
        member: list[int] = []
        for segment, of_segment in zip(segments, members, strict=True):
            if of_segment:
                ordered = range(len(flat), len(flat) + len(of_segment))
                for token in segment.token_indices.tolist():
                    tokens.extend([token] * len(of_segment))
                    member.extend(ordered)
                flat.extend(of_segment)
        return cls(flat, np.array(tokens), np.array(member))

    def rows(self, width: int, which: Indices, names: tuple[Factor, ...], counts: Indices) -> Rows:
        """Return the rows of some items, item by item: counts[k, n] of the factor names[n] of item which[k]."""
        factor = self.slot[which, None] * len(names) + np.arange(len(names))
        used, place = np.unique(factor[counts > 0], return_inverse=True)
        factors = tuple((int(self.slots[one // len(names)]), names[one % len(names)]) for one in used.tolist())
        return Rows(width, factors, np.repeat(place, counts[counts > 0]), _ramps(counts.ravel()))


def _lay_shrinks(items: _Items, in_features: int) -> tuple[tuple[Shrink, ...], Channels | None]:
    shrinks = []
    reads_all = (items.has_a == 1) & (items.num_inputs == ALL)
    counts = np.stack((np.where(reads_all, items.rank, 0), items.num_experts), axis=1)
    if counts.any():
        starts = _starts(counts.ravel()).reshape(counts.shape)
        items.product[reads_all], items.logit = starts[reads_all, 0], starts[:, 1]
        rows = items.rows(in_features, np.arange(len(counts)), ("a", "router"), counts)
        lengths = np.bincount(items.row, counts.sum(axis=1), len(items.tokens)).astype(np.int64)
        shrinks.append(_shrink(items, rows, None, lengths))
    reads_some = (items.has_a == 1) & (items.num_inputs != ALL)
    for width in np.unique(items.num_inputs[reads_some]).tolist():
        which = np.flatnonzero(reads_some & (items.num_inputs == width))
        ranks = items.rank[which]
        items.product[which] = items.num_products + _starts(ranks)
        rows = items.rows(width, which, ("a",), ranks[:, None])
        channels = _channels(items, which, items.num_inputs, in_features)
        shrinks.append(_shrink(items, rows, channels, ranks))
    copying = np.flatnonzero(items.has_a == 0)
    if not len(copying):
        return tuple(shrinks), None
    items.product[copying] = items.num_products + _starts(items.rank[copying])
    items.num_products += int(items.rank[copying].sum())
    return tuple(shrinks), _channels(items, copying, items.num_inputs, in_features)


def _shrink(items: _Items, rows: Rows, channels: Channels | None, lengths: Indices) -> Shrink:
    count = len(rows.within)
    items.num_products += count
    offsets = np.append(_starts(lengths), count).astype(np.int32)
    return Shrink(rows, channels, torch.from_numpy(offsets), torch.zeros(count))


def _lay_gates(items: _Items) -> Gates | None:
    which = np.flatnonzero(items.num_experts)
    if not len(which):
        return None
    experts = np.arange(int(items.num_experts.max()))
    padding = experts >= items.num_experts[which, None]
    logits = np.where(padding, 0, items.logit[which, None] + experts)
    shares = torch.ones(logits.size + 1)
    return Gates(
        logits=torch.from_numpy(logits.ravel()),
        padding=torch.from_numpy(padding) if padding.any() else None,
        beyond=torch.from_numpy(experts >= items.top_k[which, None]),
        shares=shares,
        by_expert=shares[:-1].view(logits.shape),
    )


def _lay_expands(items: _Items, gates: Gates | None, out_features: int) -> tuple[Expand, ...]:
    whole = (items.has_b == 1) & (items.num_outputs == ALL)
    expands = []
    if whole.any():
        which = np.flatnonzero(whole)
        lengths = np.bincount(items.row[which], items.rank[which], len(items.tokens)).astype(np.int64)
        expands.append(_expand(items, gates, which, out_features, _starts(lengths), None))
    copied = np.flatnonzero(items.has_b == 0)
    if len(copied):
        channels = _channels(items, copied, items.num_outputs, out_features)
        expands.append(_expand(items, gates, copied, None, items.row[:0], channels))
    some = (items.has_b == 1) & (items.num_outputs != ALL)
    for width in np.unique(items.num_outputs[some]).tolist():
        which = np.flatnonzero(some & (items.num_outputs == width))
        channels = _channels(items, which, items.num_outputs, out_features)
        expands.append(_expand(items, gates, which, width, _starts(items.rank[which]), channels))
    return tuple(expands)


def _expand(
    items: _Items,
    gates: Gates | None,
    which: Indices,
    width: int | None,
    offsets: Indices,
    channels: Channels | None,
) -> Expand:
    ranks = items.rank[which]
    ramps = _ramps(ranks)
    takes = np.repeat(items.product[which], ranks) + ramps
    is_all = len(takes) == items.num_products and bool((takes == np.arange(len(takes))).all())
    rows = None if width is None else items.rows(width, which, ("b",), ranks[:, None])
    shares = None
    if gates is not None and items.num_experts[which].any():
        gated = items.num_experts > 0
        first_share = np.where(gated, (np.cumsum(gated) - 1) * gates.beyond.shape[1], len(gates.shares) - 1)[which]
        expert_rank = np.where(gated, items.rank // np.maximum(items.num_experts, 1), items.rank + 1)[which]
        shares = torch.from_numpy(np.repeat(first_share, ranks) + ramps // np.repeat(expert_rank, ranks))
    return Expand(
        takes=None if is_all else torch.from_numpy(takes),
        scales=torch.from_numpy(np.repeat(items.scale[which], ranks)),
        shares=shares,
        rows=rows,
        offsets=torch.from_numpy(offsets.astype(np.int32)),
        channels=channels,
    )


def _channels(items: _Items, which: Indices, num_channels: Indices, row_length: int) -> Channels:
    """Address the channels of some items, each in its token's row."""
    counts = num_channels[which]
    used, slot = np.unique(items.slot[which], return_inverse=True)
    by_slot = np.zeros(len(used), dtype=np.int64)
    by_slot[slot] = counts
    return Channels(
        slots=tuple(items.slots[used].tolist()),
        picks=np.repeat(_starts(by_slot)[slot], counts) + _ramps(counts),
        bases=np.repeat(items.row[which] * row_length, counts),
    )


def _starts(counts: Indices) -> Indices:
    """Return where each of consecutive stretches begins."""
    return np.cumsum(counts) - counts


def _ramps(counts: Indices) -> Indices:
    """Return 0, 1, ... counts[k] - 1 for every k, one after another."""
    return np.arange(int(counts.sum())) - np.repeat(_starts(counts), counts)
