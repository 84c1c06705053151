"""What every kernel test shares: the one table of tolerances, and the drawing of units, routings and paged batches.

Product code does not import it. Everything is drawn from a generator that the test seeds, so a failure repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from motley_kernels.adapter_delta.types import DeltaUnit
from motley_kernels.paged_attention.types import LayerKV, PagedBatch

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {  # dtype: (relative, absolute), for values of order one
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}

Routing = Literal["distinct", "uniform", "skewed", "identical"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)

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
    """Draw a unit that maps inputs of order one to outputs of order one."""
    a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
    b = torch.randn(out_features, rank, generator=generator) / rank**0.5
    scaling = 0.5 + float(torch.rand((), generator=generator))
    return DeltaUnit(a.to(dtype), b.to(dtype), scaling)


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
