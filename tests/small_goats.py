"""Mixtures of experts on small random models: attached, moved away from where they began, run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from adapter_files import spec_of
from architectures import build_model
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.job.loop import set_training
from motley_trainer.methods.goat import AttachedGoat, Goat
from motley_trainer.methods.goat_linear import GoatLinear
from motley_trainer.methods.method import Context
from motley_trainer.spec.settings import GoatSettings
from small_trainings import VOCABULARY
from torch import Tensor, nn
from transformers import PreTrainedModel

SETTINGS = GoatSettings(rank=8, experts=4, top_k=2)
TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(9))
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
PADDED = Batch(TOKENS, MASK, TOKENS.masked_fill(MASK == 0, -100))


def attach(
    model: PreTrainedModel, settings: GoatSettings = SETTINGS, *, seed: int = 0, quantization: str = "none", **more: Any
) -> AttachedGoat:
    model.requires_grad_(False)
    spec = replace(spec_of(model), quantization=quantization)
    return Goat(settings).attach(
        model, Context(spec, seed, lambda count: [], spectra=more.get("spectra")), more.get("resumed")
    )


def small_model() -> PreTrainedModel:
    return build_model("llama", vocab_size=VOCABULARY)


def disturb(attached: AttachedGoat, seed: int = 3) -> None:
    """Move every factor away from what it began with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attached.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


def goats(model: nn.Module) -> dict[str, GoatLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, GoatLinear)}


def trained_on(model: PreTrainedModel, attached: AttachedGoat, batch: Batch) -> Tensor | None:
    """Make the forward pass of a step, and return what the method adds to its loss."""
    set_training(model, attached, True)
    summed_loss(model, batch)
    extra = attached.extra_loss(batch)
    set_training(model, attached, False)
    return extra
