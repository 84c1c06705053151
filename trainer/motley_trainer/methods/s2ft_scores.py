"""How much the channels that S2FT chooses from matter: by weight, by activation, by both, by gradient.

A channel is scored where it is read: an FFN channel at down_proj's column, a head at its columns of o_proj. Where the
side that writes it is to be trained, the score is the same channel's; a key-value head has that of the query heads
which read it, together. Weights are taken as they are served: quantized ones as what their products say. Runs on the
thread that owns the model.
Source: S2FT, arXiv:2412.06289, section 3.2 and its table of selection strategies; no released code pins the norms down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from motley_bases.spec import BaseSpec
from torch import Tensor, nn
from transformers import PreTrainedModel

from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.methods.product_weight import weight_columns
from motley_trainer.methods.s2ft_sites import Place, Site, sites_of
from motley_trainer.spec.settings import ChannelScore

Watch = Callable[[str, Tensor, Tensor], None]
"""Takes a path, inputs [T, I] and the gradients of outputs [T, O]."""


def score_sites(
    model: PreTrainedModel,
    base: BaseSpec,
    sites: Sequence[Site],
    score: ChannelScore,
    calibration: Callable[[], Sequence[Batch]],
) -> list[Tensor]:
    """Score the items of sites.

    Shapes: of each site [num_items], float32, at least 0.
    Semantics: `calibration` is called where samples are needed alone. RANDOM has no scores.
    """
    read_at = {site: _read_at(base, site) for site in sites}
    squares = _column_squares(model, sorted({site.path for site in read_at.values()}), score, calibration)
    return [_of_site(base, site, read_at[site], squares[read_at[site].path]) for site in sites]


def _read_at(base: BaseSpec, site: Site) -> Site:
    """Return the site where the channels that a site writes are read; itself, if it reads them."""
    reader = {Place.V_PROJ: Place.O_PROJ, Place.UP_PROJ: Place.DOWN_PROJ}.get(site.place)
    return site if reader is None else sites_of(base, reader)[site.layer]


def _of_site(base: BaseSpec, site: Site, read: Site, squares: Sequence[Tensor]) -> Tensor:
    """Fold the squares of columns onto items, and return the product of what factors of a score there are."""
    scores = torch.ones(site.num_items)
    for of_columns in squares:
        of_items = of_columns.view(read.num_items, read.item_size).sum(1)
        scores = scores * of_items.view(site.num_items, -1).sum(1).sqrt()  # a key-value head's query heads lie together
    return scores


def _column_squares(
    model: PreTrainedModel, paths: Sequence[str], score: ChannelScore, calibration: Callable[[], Sequence[Batch]]
) -> dict[str, list[Tensor]]:
    """Return the squared norms that a score is made of, for each Linear. Shapes: [I] each, float32."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    if score in (ChannelScore.WEIGHT, ChannelScore.WEIGHT_ACTIVATION):
        for path in paths:
            found[path].append(weight_squares(cast(nn.Linear, model.get_submodule(path))))
    if score in (ChannelScore.ACTIVATION, ChannelScore.WEIGHT_ACTIVATION):
        for path, squares in _activation_squares(model, paths, calibration()).items():
            found[path].append(squares)
    if score is ChannelScore.GRADIENT:
        for path, squares in _gradient_squares(model, paths, calibration()).items():
            found[path].append(squares)
    return found


def weight_squares(linear: nn.Linear) -> Tensor:
    """Return the squared norm of every column of the weight that a Linear's products have. Shapes: [I] float32."""
    return torch.cat([columns.square().sum(1) for columns in weight_columns(linear)]).cpu()


@torch.no_grad()
def _activation_squares(model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the squared norm of what goes into every channel, over all tokens of the batches."""
    sums = {path: torch.zeros(cast(nn.Linear, model.get_submodule(path)).in_features) for path in paths}
    for batch in batches:
        is_token = batch.attention_mask.bool()

        def add(path: str, module: nn.Module, inputs: tuple[Tensor, ...], of: Tensor = is_token) -> None:
            sums[path] += inputs[0][of].float().square().sum(0).cpu()

        handles = [model.get_submodule(path).register_forward_pre_hook(partial(add, path)) for path in paths]
        try:
            model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    return sums


def _gradient_squares(model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the squared norm of the gradient at every column, for the loss over all batches together."""
    gradients: dict[str, Tensor] = {}

    def add(path: str, inputs: Tensor, of_outputs: Tensor) -> None:
        gradient = of_outputs.float().T @ inputs.float()
        gradients[path] = gradients[path].add_(gradient) if path in gradients else gradient

    with torch.enable_grad(), _watched(model, paths, add):
        for batch in batches:
            summed_loss(model, batch).backward()
    return {path: gradient.square().sum(0).cpu() for path, gradient in gradients.items()}


@contextmanager
def _watched(model: PreTrainedModel, paths: Sequence[str], watch: Watch) -> Iterator[None]:
    """Show what goes into some Linears, and the gradient of what comes out, though no parameter has one."""

    def seen(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: watch(path, read, gradient.flatten(0, -2)))

    handles = [model.get_input_embeddings().register_forward_hook(_start)]
    handles += [model.get_submodule(path).register_forward_hook(partial(seen, path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()  # nothing before needs a gradient
