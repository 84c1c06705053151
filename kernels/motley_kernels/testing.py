"""What every kernel test shares: the one table of tolerances, and the drawing of units, routings and paged batches.

Product code does not import it. Everything is drawn from a generator that the test seeds, so a failure repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from motley_kernels.adapter_delta.types import DeltaUnit, Gate
from motley_kernels.paged_attention.types import LayerKV, PagedBatch

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {  # dtype: (relative, absolute), for values of order one
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

Routing = Literal["distinct", "uniform", "skewed", "identical"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)

Kind = Literal[
    "lora", "s2ft_input", "s2ft_output", "goat", "residual", "compact", "compact_input", "compact_output"
]  # of unit, as a kernel sees it
KINDS: tuple[Kind, ...] = get_args(Kind)

Members = tuple[tuple[int, float], ...]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert equality up to the tolerance of the dtype that the computation was rounded to.

    Raises: AssertionError, naming the worst element; a NaN on either side is a difference.
    """
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute)


def draw_unit(
    rank: int, in_features: int, out_features: int, generator: Generator, dtype: torch.dtype = torch.float32
) -> DeltaUnit:
    """Draw a plain low-rank unit that maps inputs of order one to outputs of order one."""
    a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    b = torch.randn(rank, out_features, generator=generator) / max(1, rank) ** 0.5
    return DeltaUnit(a.to(dtype), b.to(dtype), _draw_scaling(generator))


draw_lora = draw_unit


def draw_s2ft_input(
    num_channels: int, in_features: int, out_features: int, generator: Generator, dtype: torch.dtype = torch.float32
) -> DeltaUnit:
    """Draw a unit over selected input channels: no a, the products are the inputs themselves."""
    b = torch.randn(num_channels, out_features, generator=generator) / max(1, num_channels) ** 0.5
    channels = draw_channels(num_channels, in_features, generator)
    return DeltaUnit(None, b.to(dtype), 1.0, inputs=channels)


def draw_s2ft_output(
    num_channels: int, in_features: int, out_features: int, generator: Generator, dtype: torch.dtype = torch.float32
) -> DeltaUnit:
    """Draw a unit over selected output channels: no b, the products are the outputs themselves."""
    a = torch.randn(num_channels, in_features, generator=generator) / in_features**0.5
    channels = draw_channels(num_channels, out_features, generator)
    return DeltaUnit(a.to(dtype), None, 1.0, outputs=channels)


def draw_goat(
    num_experts: int,
    expert_rank: int,
    top_k: int,
    in_features: int,
    out_features: int,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
) -> DeltaUnit:
    """Draw a unit of experts of one rank each, whose routing differs from token to token.

    Semantics: with inputs from `draw_inputs` logits are exact sums, the same in any order, so that no two
    implementations can disagree about the likeliest; equal ones occur.
    """
    plain = draw_unit(num_experts * expert_rank, in_features, out_features, generator, dtype)
    router = (torch.randn(num_experts, in_features, generator=generator) * (192 / in_features**0.5)).round() / 64
    return DeltaUnit(plain.a, plain.b, plain.scaling, gate=Gate(router, top_k))


def draw_compact(
    rank: int,
    in_features: int,
    out_features: int,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
    *,
    kept_inputs: int | None = None,
    kept_outputs: int | None = None,
) -> DeltaUnit:
    """Draw a low-rank unit over kept input channels, kept output channels or both; None keeps all."""
    reads = in_features if kept_inputs is None else kept_inputs
    writes = out_features if kept_outputs is None else kept_outputs
    plain = draw_unit(rank, reads, writes, generator, dtype)
    inputs = None if kept_inputs is None else draw_channels(kept_inputs, in_features, generator)
    outputs = None if kept_outputs is None else draw_channels(kept_outputs, out_features, generator)
    return DeltaUnit(plain.a, plain.b, plain.scaling, inputs=inputs, outputs=outputs)


def draw_kind(
    kind: Kind, rank: int, in_features: int, out_features: int, generator: Generator, dtype: torch.dtype = torch.float32
) -> DeltaUnit:
    """Draw a unit of one kind.

    Semantics: `rank` is that of a plain unit; selected channels are as many, as far as there are so many; experts are
    as many of one row each up to eight, or more rows where that divides the rank; kept channels are about two thirds.
    """
    sides = (in_features, out_features, generator, dtype)
    if kind == "lora":
        return draw_unit(rank, *sides)
    if kind == "s2ft_input":
        return draw_s2ft_input(min(rank, in_features), *sides)
    if kind == "s2ft_output":
        return draw_s2ft_output(min(rank, out_features), *sides)
    if kind == "goat":
        num_experts = max(count for count in range(1, 9) if rank % count == 0)
        top_k = 1 + int(torch.randint(num_experts, (), generator=generator))
        return draw_goat(num_experts, rank // num_experts, top_k, *sides)
    if kind == "residual":
        plain = draw_unit(rank, *sides)
        return DeltaUnit(plain.a, plain.b, -0.05)
    return draw_compact(
        rank,
        *sides,
        kept_inputs=None if kind == "compact_output" else -(-in_features * 2 // 3),
        kept_outputs=None if kind == "compact_input" else -(-out_features * 2 // 3),
    )


def draw_inputs(num_tokens: int, in_features: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw inputs of order one, multiples of 1/64."""
    return ((torch.randn(num_tokens, in_features, generator=generator) * 64).round() / 64).to(dtype)


def draw_channels(count: int, num_channels: int, generator: Generator) -> Tensor:
    """Draw distinct channels, ascending, [count] int32."""
    return torch.randperm(num_channels, generator=generator)[:count].sort().values.to(torch.int32)


def _draw_scaling(generator: Generator) -> float:
    return 0.5 + float(torch.rand((), generator=generator))


def draw_slots(routing: Routing, num_sequences: int, num_slots: int, generator: Generator) -> list[int]:
    """Draw which of `num_slots` adapters each sequence uses.

    Semantics: distinct: no two the same while slots last; uniform: independent; skewed: adapter k with probability ~ 1
    / (k + 1)^1.5; identical: one for all.
    """
    if routing == "distinct":
        order: list[int] = torch.randperm(num_slots, generator=generator).tolist()
        return [order[n % num_slots] for n in range(num_sequences)]
    if routing == "identical":
        return [int(torch.randint(num_slots, (), generator=generator))] * num_sequences
    ranks = torch.arange(1, num_slots + 1, dtype=torch.float64)
    weights = ranks**-1.5 if routing == "skewed" else torch.ones_like(ranks)
    drawn: list[int] = torch.multinomial(weights, num_sequences, replacement=True, generator=generator).tolist()
    return drawn


def draw_sets(
    routing: Routing, num_sequences: int, num_slots: int, max_members: int, base_share: float, generator: Generator
) -> list[Members]:
    """Draw each sequence's unit set.

    Semantics: a share of `base_share` is the base alone. Of the others half take their routed adapter plainly, so that
    sets recur, and half take it with up to max_members - 1 more, under weights in [-1.5, 1.5) other than 0.
    """
    sets: list[Members] = []
    for slot in draw_slots(routing, num_sequences, num_slots, generator):
        if float(torch.rand((), generator=generator)) < base_share:
            sets.append(())
            continue
        if float(torch.rand((), generator=generator)) < 0.5:
            sets.append(((slot, 1.0),))
            continue
        count = min(num_slots, int(torch.randint(1, max_members + 1, (), generator=generator)))
        others = [other for other in torch.randperm(num_slots, generator=generator).tolist() if other != slot]
        weights = (torch.rand(count, generator=generator) * 3 - 1.5).tolist()
        sets.append(tuple((s, w or 1.0) for s, w in zip([slot, *others[: count - 1]], weights, strict=True)))
    return sets


@dataclass(frozen=True, eq=False, slots=True)
class PagedCase:
    """A drawn problem of paged attention.

    Semantics: what is already stored lies in `kv`; all memory that no sequence owns is NaN.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv: LayerKV
    batch: PagedBatch

    def fresh_kv(self) -> LayerKV:
        """Return a copy of the memory, for another run."""
        return LayerKV(self.kv.key.clone(), self.kv.value.clone())


def draw_paged_case(
    query_lens: Sequence[int],
    cached_lens: Sequence[int],
    generator: Generator,
    *,
    block_size: int = 16,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PagedCase:
    """Draw a packed batch over scattered blocks, with everything unowned poisoned."""
    seq_lens = [query + cached for query, cached in zip(query_lens, cached_lens, strict=True)]
    num_blocks = [-(-length // block_size) for length in seq_lens]
    order: list[int] = torch.randperm(sum(num_blocks) + 3, generator=generator).tolist()
    shape = (len(order), block_size, num_kv_heads, head_dim)
    kv = LayerKV(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
    tables = torch.zeros(len(seq_lens), max(num_blocks, default=0), dtype=torch.int64)
    slots: list[int] = []
    for n, (length, cached) in enumerate(zip(seq_lens, cached_lens, strict=True)):
        blocks = [order.pop() for _ in range(num_blocks[n])]
        tables[n, : len(blocks)] = torch.tensor(blocks)
        rows = [blocks[p // block_size] * block_size + p % block_size for p in range(length)]
        slots += rows[cached:]
        for memory in (kv.key, kv.value):
            stored = torch.randn(cached, num_kv_heads, head_dim, generator=generator).to(dtype)
            memory.view(-1, num_kv_heads, head_dim)[rows[:cached]] = stored
    num_tokens = sum(query_lens) + padding
    q, k, v = (
        torch.randn(num_tokens, heads, head_dim, generator=generator).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    slot_mapping = torch.tensor(slots + [-1] * padding, dtype=torch.int64)
    batch = PagedBatch(block_size, tables, slot_mapping, tuple(query_lens), tuple(seq_lens))
    return PagedCase(q, k, v, kv, batch)
