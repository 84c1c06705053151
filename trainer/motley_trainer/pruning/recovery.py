"""Recovery: a LoRA on all Linears of the layers, trained on the pruned copy, and merged into it.

Owns the loop, and what is merged. A merge keeps the pruned shapes, since pruning took rows and columns and left
no zeros. Draws come from generators of its own. Runs on the thread that owns the model.
Source: LLM-Pruner, arXiv:2305.11627, section 3.3; LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from motley_bases.fingerprint import StoredTensor, combine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from motley_trainer.errors import TextError
from motley_trainer.methods.lora_linear import LoraLinear
from motley_trainer.pruning.gradients import window_losses
from motley_trainer.pruning.groups import groups_of
from motley_trainer.pruning.perplexity import mean_loss
from motley_trainer.pruning.settings import RecoverySettings

NUM_LOOKS = 10  # at the validation windows, evenly spread over the steps
MAX_VALIDATION_WINDOWS = 64
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a recovery did.

    Semantics: `digest` is "sha256:..." over the factors that were merged; None where nothing was, as no step made the
    validation loss lower: then `best_step` is 0. The losses are of the validation windows, before the first step and at
    the step whose factors were taken.
    """

    digest: str | None
    best_step: int
    loss_before: float
    loss_after: float


def recover(
    model: PreTrainedModel,
    windows: Tensor,
    settings: RecoverySettings,
    *,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Recovered:
    """Train a LoRA on windows of text and merge the best of it into the model.

    Shapes: windows [N, T] token ids.
    Semantics: a tenth of the windows is kept for validation and not trained on; the factors with the least validation
    loss are merged, which are the first, and nothing, where training made it no better.
    Effects: changes the weights of the layers' Linears and nothing else; leaves all parameters frozen.
    Raises: TextError with reason TEXT_TOO_SHORT if there are not two windows.
    """
    if len(windows) < 2:
        raise TextError("recovery needs two windows of text at least", reason="TEXT_TOO_SHORT", field="calibration")
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    num_validation = min(math.ceil(len(windows) / 10), MAX_VALIDATION_WINDOWS)
    validation, training = windows[order[:num_validation]], windows[order[num_validation:]].to(model.device)
    adapted = attach(model, settings, torch.Generator(device=model.device).manual_seed(seed))
    before = best_loss = mean_loss(model, validation)
    best_step, best = 0, _factors(adapted)
    look_every = math.ceil(settings.steps / NUM_LOOKS)
    for step in _train(model, adapted, training, settings, seed):
        on_step()
        if step % look_every == 0 or step == settings.steps:
            loss = mean_loss(model.eval(), validation)
            if loss < best_loss:
                best_step, best_loss, best = step, loss, _factors(adapted)
    _restore(adapted, best)
    merge(model, adapted)
    return Recovered(_digest(best) if best_step else None, best_step, before, best_loss)


def attach(model: PreTrainedModel, settings: RecoverySettings, generator: torch.Generator) -> dict[str, LoraLinear]:
    """Put a LoRA beside every Linear of the layers, and return them by path; all else is frozen."""
    model.requires_grad_(False)
    adapted: dict[str, LoraLinear] = {}
    for path in dict.fromkeys(member.path for groups in groups_of(model) for member in groups.members):
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)  # groups_of has looked
        adapted[path] = LoraLinear(
            linear,
            rank=settings.rank,
            scaling=settings.lora_alpha / settings.rank,
            initial=generator,
            dropout=settings.dropout,
            drops=generator,
        )
        model.set_submodule(path, adapted[path])
    return adapted


def merge(model: PreTrainedModel, adapted: Mapping[str, LoraLinear]) -> None:
    """Merge every LoRA into its Linear, and put the Linears back."""
    for path, lora in adapted.items():
        model.set_submodule(path, lora.merged())


def _train(
    model: PreTrainedModel, adapted: Mapping[str, LoraLinear], windows: Tensor, settings: RecoverySettings, seed: int
) -> Iterator[int]:
    """Take the steps, yielding the number of each when it is done."""
    weights = [factor for lora in adapted.values() for factor in (lora.lora_a, lora.lora_b)]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, partial(_rate, settings))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, settings.steps + 1):
        model.train()
        drawn = torch.randint(len(windows), (settings.batch_size,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        window_losses(model, windows[drawn.to(windows.device)]).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        yield step
    model.eval()


def _rate(settings: RecoverySettings, step: int) -> float:
    """Scale the learning rate: up over the warm-up, or a fifth of the steps if there are few, and linearly down."""
    warmup = max(1, min(settings.warmup_steps, settings.steps // 5))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (settings.steps - step) / max(1, settings.steps - warmup))


def _factors(adapted: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": getattr(lora, name).detach().clone()
        for path, lora in adapted.items()
        for name in ("lora_a", "lora_b")
    }


@torch.no_grad()
def _restore(adapted: Mapping[str, LoraLinear], factors: Mapping[str, Tensor]) -> None:
    for path, lora in adapted.items():
        lora.lora_a.copy_(factors[f"{path}.lora_a"])
        lora.lora_b.copy_(factors[f"{path}.lora_b"])


def _digest(factors: Mapping[str, Tensor]) -> str:
    return combine(
        StoredTensor(name, "F32", tuple(factor.shape), hashlib.sha256(factor.cpu().numpy().tobytes()).hexdigest())
        for name, factor in factors.items()
    )
