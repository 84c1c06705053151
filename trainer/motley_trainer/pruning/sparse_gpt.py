"""SparseGPT: single weights of a Linear set to zero, and those that stay moved to make up for them.

Owns the algorithm for one weight, and the pass over a model in which each layer sees what the pruned ones before it
give. Shapes never change, and dense products take the same memory and time with zeros as without. Runs on the thread
that owns the model.
Source: SparseGPT, arXiv:2301.00774, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.errors import UnsuitableBaseError
from motley_trainer.pruning.groups import groups_of
from motley_trainer.pruning.masks import MaskRule

BLOCK_SIZE = 128  # columns between which errors are handed on at once
DAMPING = 0.01  # of the mean of the Hessian's diagonal
BATCH_SIZE = 16  # windows


@dataclass(frozen=True, slots=True)
class Sparsified:
    """How many of the weights that might have gone are zero now."""

    num_zeros: int
    num_weights: int


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    windows: Tensor,
    layers: range,
    rule: MaskRule,
    on_layer: Callable[[], None] = lambda: None,
) -> Sparsified:
    """Prune all Linears of some layers of a model in place, calling `on_layer` before each layer.

    Shapes: windows [N, T] token ids.
    Semantics: a layer's Linears are pruned together, on what the layer is given once those before it are pruned.
    Raises: UnsuitableBaseError with reason NO_CLOSED_FORM for other layers than Llama's, NOT_FINITE if what a Linear is
    given cannot be computed with.
    """
    model.requires_grad_(False)
    paths = linears_of(model, layers)
    entries = [_Entry.of(model, batch, layers) for batch in windows.split(BATCH_SIZE)]
    num_zeros = num_weights = 0
    for layer in layers:
        on_layer()
        linears = {path: cast(nn.Linear, model.get_submodule(path)) for path in paths[layer]}
        with _watched(linears) as hessians:
            for entry in entries:
                entry.through(model, layer)
        for path, linear in linears.items():
            weight = linear.weight.float()
            prune_weight(weight, hessians.pop(path), rule, path=path)
            linear.weight.copy_(weight)
            num_zeros += int((linear.weight == 0).sum())
            num_weights += weight.numel()
        for entry in entries:
            entry.hidden = entry.through(model, layer)
    return Sparsified(num_zeros, num_weights)


def linears_of(model: PreTrainedModel, layers: range) -> dict[int, tuple[str, ...]]:
    """Return the paths of the Linears that are pruned in each of some layers.

    Raises: UnsuitableBaseError with reason NO_CLOSED_FORM for other layers than Llama's.
    """
    paths: dict[int, dict[str, None]] = {layer: {} for layer in layers}
    for groups in groups_of(model):
        if groups.layer in paths:
            paths[groups.layer] |= dict.fromkeys(member.path for member in groups.members)
    return {layer: tuple(of_layer) for layer, of_layer in paths.items()}


@torch.no_grad()
def prune_weight(
    weight: Tensor, hessian: Tensor, rule: MaskRule, *, block_size: int = BLOCK_SIZE, path: str = "weight"
) -> None:
    """Set weights to zero, column by column, and move those to the right so that outputs change least.

    Shapes: weight [O, I] float32, in place; hessian [I, I], that of half the squared error of an output: the mean of
    twice x x^T.
    Semantics: an input that was never other than zero loses all its weights.
    Raises: UnsuitableBaseError with reason NOT_FINITE.
    """
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    factor = inverse_factor(hessian, path).to(weight.dtype)
    together = rule.num_columns or 1
    size = max(block_size // together, 1) * together
    for begin in range(0, weight.shape[1], size):
        end = min(begin + size, weight.shape[1])
        errors = _prune_block(weight[:, begin:end], factor[begin:end, begin:end], rule)
        weight[:, end:] -= errors @ factor[begin:end, end:]


def inverse_factor(hessian: Tensor, path: str = "weight") -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of a Hessian that was damped. Shapes: [I, I]; float64.

    Raises: UnsuitableBaseError with reason NOT_FINITE.
    """
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    lower, is_bad = torch.linalg.cholesky_ex(damped)
    factor: Tensor
    factor, is_inverse_bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(is_bad) or bool(is_inverse_bad) or not bool(factor.isfinite().all()):
        message = f"what {path} is given on the calibration samples is not finite"
        raise UnsuitableBaseError(message, reason="NOT_FINITE", field=path)
    return factor


def _prune_block(block: Tensor, factor: Tensor, rule: MaskRule) -> Tensor:
    """Prune some columns in place, and return what the columns to the right must make up for.

    Shapes: block [O, B], factor [B, B]; returns [O, B].
    """
    width = rule.num_columns or block.shape[1]
    errors = torch.zeros_like(block)
    goes = torch.zeros_like(block, dtype=torch.bool)
    costs = factor.diagonal().square()
    for place in range(block.shape[1]):
        if place % width == 0:
            chosen = slice(place, place + width)
            goes[:, chosen] = rule.goes(block[:, chosen].square() / costs[chosen])
        column = block[:, place].clone()
        left = column.masked_fill(goes[:, place], 0)
        errors[:, place] = (column - left) / factor[place, place]
        block[:, place:] -= errors[:, place, None] * factor[place, place:]
        block[:, place] = left  # exactly
    return errors


class _Entry:
    """Some windows on their way through a model: what the next layer is given, and what each is given beside it."""

    def __init__(self, hidden: Tensor, beside: Mapping[int, Mapping[str, Any]]) -> None:
        self.hidden = hidden
        self._beside = beside

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Tensor, layers: range) -> _Entry:
        """Take windows as far as the first layer; masks and positions are the model's own."""
        beside: dict[int, Mapping[str, Any]] = {}
        hidden: list[Tensor] = []

        def keep(layer: int, args: tuple[Tensor, ...], named: Mapping[str, Any]) -> None:
            if layer == layers.start:
                hidden.append(args[0])
            beside[layer] = named

        def hook(layer: int) -> Callable[..., None]:
            return lambda module, args, named: keep(layer, args, named)

        decoder = cast(Any, model).model
        handles = [decoder.layers[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in layers]
        try:
            decoder(input_ids=batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return cls(hidden[0], beside)

    def through(self, model: PreTrainedModel, layer: int) -> Tensor:
        """Return what a layer makes of what it is given."""
        output = cast(Any, model).model.layers[layer](self.hidden, **self._beside[layer])
        return output[0] if isinstance(output, tuple) else cast(Tensor, output)


@contextmanager
def _watched(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    """Gather the Hessian of each Linear from what it is given meanwhile; complete at the end."""
    hessians: dict[str, Tensor] = {}
    counts = dict.fromkeys(linears, 0)

    def watch(path: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            product = x.T @ x
            hessians[path] = hessians[path].add_(product) if path in hessians else product
            counts[path] += len(x)

        return add

    handles = [linear.register_forward_pre_hook(watch(path)) for path, linear in linears.items()]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()
    for path, hessian in hessians.items():
        hessian.mul_(2 / counts[path])
