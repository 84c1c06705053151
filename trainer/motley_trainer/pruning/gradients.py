"""First and second moments of the calibration loss's gradient, for each weight that may be pruned.

Owns the pass over the calibration windows and what is gathered on the way. The weights themselves need no gradients:
each Linear's is made from its inputs and the gradient of its outputs as the backward pass comes by, sample by sample,
handed on, and dropped. So the true Fisher diagonal takes one pass, and no more than one Linear's gradient is held
while the windows fit into one batch. Knows nothing of scores. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

Reduced = TypeVar("Reduced")


@dataclass(frozen=True, slots=True)
class Moments:
    """The gradient of the loss over all windows, and the mean of the squares of each window's own.

    Shapes: both as the weight, [O, I], float32.
    Semantics: a window's loss is its mean next-token cross-entropy; the loss is the mean over the windows. `fisher` is
    the diagonal of the empirical Fisher matrix: the square comes before the mean. None if it was not asked for.
    """

    gradient: Tensor
    fisher: Tensor | None = None


def gather_moments(
    model: PreTrainedModel,
    windows: Tensor,
    paths: Collection[str],
    reduce: Callable[[str, Moments], Reduced],
    *,
    with_fisher: bool,
    batch_size: int = 16,
) -> dict[str, Reduced]:
    """Return what `reduce` makes of each named Linear's moments over the windows.

    Shapes: windows [N, T] token ids.
    Semantics: several batches give what one gives, but hold the moments of all named Linears until the last is done.
    Effects: freezes the model's parameters.
    """
    model.requires_grad_(False)
    gatherer = _Gatherer(reduce, with_fisher=with_fisher, num_windows=len(windows))
    batches = windows.split(batch_size)
    with _watched(model, paths, gatherer):
        for place, batch in enumerate(batches):
            gatherer.is_last = place == len(batches) - 1
            window_losses(model, batch).sum().backward()
    return gatherer.reduced


def window_losses(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Return each window's mean next-token cross-entropy. Shapes: windows [N, T], result [N]."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
    losses = cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return losses.mean(1)


class _Gatherer(Generic[Reduced]):
    """Add up one Linear's moments over the batches, and reduce them after the last."""

    def __init__(self, reduce: Callable[[str, Moments], Reduced], *, with_fisher: bool, num_windows: int) -> None:
        self._reduce = reduce
        self._with_fisher = with_fisher
        self._num_windows = num_windows
        self._sums: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.is_last = False
        self.reduced: dict[str, Reduced] = {}

    @torch.no_grad()
    def add(self, path: str, inputs: Tensor, output_gradients: Tensor) -> None:
        """Take one batch's inputs [N, T, I] and gradients of the outputs [N, T, O] of a Linear."""
        inputs, output_gradients = inputs.float(), output_gradients.float()
        gradient, fisher = self._sums.pop(path, (None, None))
        for sample, of_outputs in zip(inputs, output_gradients, strict=True):
            own = of_outputs.T @ sample
            gradient = own.clone() if gradient is None else gradient.add_(own)
            if self._with_fisher:
                fisher = own.square_() if fisher is None else fisher.add_(own.square_())
        assert gradient is not None  # a batch of split windows has one at least
        if not self.is_last:
            self._sums[path] = gradient, fisher
            return
        fisher = None if fisher is None else fisher.div_(self._num_windows)
        self.reduced[path] = self._reduce(path, Moments(gradient.div_(self._num_windows), fisher))


@contextmanager
def _watched(model: PreTrainedModel, paths: Collection[str], gatherer: _Gatherer[Any]) -> Iterator[None]:
    """Hand every named Linear's inputs and output gradients to the gatherer for a while."""
    handles = [model.get_input_embeddings().register_forward_hook(_start_gradients)]
    for path in paths:
        handles.append(model.get_submodule(path).register_forward_hook(partial(_watch, gatherer, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start_gradients(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()  # nothing before needs a gradient, and no parameter does


def _watch(gatherer: _Gatherer[Any], path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    seen = inputs[0].detach()
    output.register_hook(lambda gradient: gatherer.add(path, seen, gradient))
