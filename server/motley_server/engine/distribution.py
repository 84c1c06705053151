"""From logits to one drawn token: exact ranking, filtering and the inverse of the cumulative distribution.

A row's result never depends on the rows beside it: probabilities are whole multiples of 2**-33 of the likeliest
token's, held in float64, so that their sums are exact in any order and on any device, and ties go to the lowest token
id. Knows logits and sampling parameters, not requests. Runs on the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from motley_server.engine.types import SamplingParams

_SCALE = 2.0**33  # the weight of the likeliest token: sums over up to 2**20 tokens stay below 2**53
_BLOCK = 512
_WIDTHS = (64, 1024)  # how many of the likeliest tokens are ranked before a row is sorted whole


def first_argmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's greatest value and the lowest index that holds it.

    Semantics: a row with NaN has a NaN maximum. Goes by blocks, since amax is vectorised on CPUs and argmax is not.
    Shapes: values [N, V]; both results [N].
    """
    maxima = _by_block(values, Tensor.amax)
    maximum, block = maxima.amax(-1), maxima.argmax(-1)
    positions, inside = _block_of(values, block)
    offset = values.gather(1, positions).masked_fill_(~inside, -torch.inf).argmax(-1, keepdim=True)
    return maximum, positions.gather(1, offset).squeeze(1)


def ranked(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return each row's `width` greatest values and their ids, equal values by rising id.

    Semantics: the definition is a stable descending sort of the row, cut off; torch.topk, which is quicker, chooses
    freely between equal values, so rows where that could matter are looked at again.
    Shapes: values [N, V] without NaN; both results [N, min(width, V)].
    """
    if width >= values.shape[1]:
        whole = values.sort(dim=-1, descending=True, stable=True)
        return whole.values, whole.indices
    top = values.topk(width + 1, dim=-1)
    ids = top.indices[:, :width].sort(dim=-1).values
    kept, order = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    for row in (top.values[:, width - 1] == top.values[:, width]).nonzero().flatten().tolist():
        candidates = (values[row] >= top.values[row, width - 1]).nonzero().flatten()
        in_row = values[row][candidates].sort(descending=True, stable=True)
        kept[row], ids[row] = in_row.values[:width], candidates[in_row.indices[:width]]
    return kept, ids


def has_ranked_filter(params: SamplingParams) -> bool:
    """Tell whether the request's filters depend on how its tokens rank."""
    return params.top_k > 0 or params.top_p < 1.0


def draw(values: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Draw one token a row, under temperature, top_k, top_p and min_p in this order.

    Semantics: top_k keeps the k likeliest; top_p the shortest list of the likeliest whose mass, of what top_k left,
    reaches p; min_p what has at least that share of the likeliest's probability. The token is the first in vocabulary
    order whose cumulative weight exceeds `uniform` of the total, rounded down to a whole weight.
    Shapes: values [N, V] float32, V at most 2**20, each row with a finite maximum; result [N] int64.
    """
    drawn = torch.empty(len(params), dtype=torch.int64, device=values.device)
    targets = torch.tensor(uniforms, dtype=torch.float64, device=values.device)
    pending = [index for index, row in enumerate(params) if has_ranked_filter(row)]
    rest = [index for index, row in enumerate(params) if not has_ranked_filter(row)]
    for width in _WIDTHS:
        now = [index for index in pending if params[index].top_k <= width]
        if now:
            chosen = torch.tensor(now, device=values.device)
            some = [params[index] for index in now]
            drawn[chosen], is_settled = _draw_from_likeliest(_take(values, chosen), some, targets[chosen], width)
            settled = {index for index, flag in zip(now, is_settled.tolist(), strict=True) if flag}
            pending = [index for index in pending if index not in settled]
    for indices in (rest, pending):
        if indices:
            chosen = torch.tensor(indices, device=values.device)
            some = [params[index] for index in indices]
            drawn[chosen] = _draw_from_all(_take(values, chosen), some, targets[chosen])
    return drawn


def _draw_from_likeliest(
    values: Tensor, params: Sequence[SamplingParams], uniforms: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Draw from the `width` likeliest of each row; rows that might need more come back unsettled."""
    kept, ids = ranked(values, width)
    weights = _weights(kept, kept[:, :1], params)
    mass = weights.sum(-1, keepdim=True)
    open_rows = [index for index, row in enumerate(params) if row.top_k == 0]
    if open_rows and width < values.shape[1]:
        chosen = torch.tensor(open_rows, device=values.device)
        some = [params[index] for index in open_rows]
        mass[chosen] = _weights(_take(values, chosen), kept[chosen, :1], some).sum(-1, keepdim=True)
    sizes = _head_sizes(weights, mass, params)
    weights.masked_fill_(torch.arange(weights.shape[1], device=values.device) >= sizes, 0.0)
    _drop_unlikely(weights, params)
    in_order = ids.sort(dim=-1)
    sums = weights.gather(1, in_order.indices).cumsum(-1)
    tokens = in_order.values.gather(1, torch.searchsorted(sums, _targets(uniforms, sums), right=True)).squeeze(1)
    has_limit = torch.tensor([row.top_k > 0 for row in params], device=values.device)
    return tokens, has_limit | (sizes.squeeze(1) < width)


def _draw_from_all(values: Tensor, params: Sequence[SamplingParams], uniforms: Tensor) -> Tensor:
    weights = _weights(values, values.amax(-1, keepdim=True), params)
    if has_ranked_filter(params[0]):
        weights.masked_fill_(~_is_in_head(values, params), 0.0)
    _drop_unlikely(weights, params)
    sums = _by_block(weights, Tensor.sum).cumsum(-1)
    targets = _targets(uniforms, sums)
    block = torch.searchsorted(sums, targets, right=True)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0.0)
    positions, inside = _block_of(weights, block.squeeze(1))
    in_block = weights.gather(1, positions).masked_fill_(~inside, 0.0).cumsum(-1)
    return positions.gather(1, torch.searchsorted(in_block, targets - before, right=True)).squeeze(1)


def _is_in_head(values: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mark what top_k and top_p keep, by where the last value kept stands in the sorted row: [N, V]."""
    in_order = _descending(values)
    weights = _weights(in_order, in_order[:, :1], params)
    sizes = _head_sizes(weights, weights.sum(-1, keepdim=True), params)
    last = in_order.gather(1, sizes - 1)
    is_above, is_last = values > last, values == last
    return is_above | (is_last & (is_last.cumsum(-1) <= sizes - is_above.sum(-1, keepdim=True)))


def _head_sizes(weights: Tensor, mass: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return how many of each row's tokens, likeliest first, top_k and top_p leave: [N, 1]."""
    ranks = torch.arange(weights.shape[1], device=weights.device)
    limits = _column(params, lambda row: row.top_k, weights.device)
    is_in_top_k = (ranks < limits) | (limits == 0)
    mass = torch.where(limits > 0, weights.masked_fill(~is_in_top_k, 0.0).sum(-1, keepdim=True), mass)
    shares = _column(params, lambda row: row.top_p, weights.device)
    is_in_top_p = (weights.cumsum(-1) - weights < shares * mass) | (shares >= 1.0)
    return (is_in_top_k & is_in_top_p).sum(-1, keepdim=True)


def _descending(values: Tensor) -> Tensor:
    # Without indices NumPy sorts several times faster than torch does on a CPU.
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    return values.sort(dim=-1, descending=True).values


def _targets(uniforms: Tensor, sums: Tensor) -> Tensor:
    return (uniforms * sums[:, -1]).floor_().unsqueeze(1)


def _weights(values: Tensor, peak: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    weights = values.to(torch.float64)
    temperatures = _column(params, lambda row: row.temperature, values.device)
    return weights.sub_(peak).div_(temperatures).exp_().mul_(_SCALE).round_()


def _drop_unlikely(weights: Tensor, params: Sequence[SamplingParams]) -> None:
    if any(row.min_p > 0.0 for row in params):
        weights.masked_fill_(weights < _column(params, lambda row: row.min_p, weights.device) * _SCALE, 0.0)


def _column(params: Sequence[SamplingParams], read: Callable[[SamplingParams], float], device: torch.device) -> Tensor:
    return torch.tensor([[read(row)] for row in params], dtype=torch.float64, device=device)


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Return some rows, named in rising order: naming all of them copies nothing."""
    return values if len(rows) == len(values) else values.index_select(0, rows)


def _by_block(values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce [N, V] to [N, blocks], the last block perhaps short."""
    num_whole = values.shape[1] // _BLOCK
    whole = reduce(values[:, : num_whole * _BLOCK].view(len(values), num_whole, _BLOCK), -1)
    rest = values[:, num_whole * _BLOCK :]
    if rest.shape[1] == 0:
        return whole
    return torch.cat([whole, reduce(rest, -1).unsqueeze(1)], dim=1)


def _block_of(values: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions [N, block] of one block a row, and which of them are in the vocabulary."""
    positions = block.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=values.device)
    inside = positions < values.shape[1]
    return positions.clamp_(max=values.shape[1] - 1), inside
