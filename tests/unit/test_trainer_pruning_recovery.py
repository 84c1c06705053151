"""Recovery trains a LoRA and nothing else, keeps the best of it, and leaves plain Linears behind."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from architectures import build_model
from motley_trainer.errors import TextError
from motley_trainer.pruning.iterative import prune_in_steps
from motley_trainer.pruning.perplexity import mean_loss
from motley_trainer.pruning.recovery import LoraLinear, Recovered, attach, merge, recover
from motley_trainer.pruning.settings import PruneSettings, RecoverySettings
from motley_trainer.pruning.surgery import num_parameters, shapes_of
from torch import Tensor, nn
from transformers import PreTrainedModel

# Text with something to learn: each token is followed by its successor.
WINDOWS = (torch.arange(12) + torch.arange(40)[:, None] * 3) % 50
QUICK = RecoverySettings(steps=30, learning_rate=5e-3, warmup_steps=5, batch_size=8)


def pruned(family: str = "llama") -> PreTrainedModel:
    model = build_model(family, vocab_size=50)
    prune_in_steps(model, PruneSettings(Fraction(1, 2), first_layer=1, window=12, num_windows=4), WINDOWS[:4])
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=WINDOWS[:3], use_cache=False).logits
    return result


def train(model: PreTrainedModel, settings: RecoverySettings = QUICK, seed: int = 0) -> Recovered:
    return recover(model, WINDOWS, settings, seed=seed)


def test_a_merged_lora_computes_what_it_did_beside_the_weights() -> None:
    model = pruned("llama_biased")
    adapted = attach(model, QUICK, torch.Generator().manual_seed(1))
    assert len(adapted) == 7 * 3
    for lora in adapted.values():
        nn.init.normal_(lora.lora_b, std=0.05, generator=torch.Generator().manual_seed(2))
    beside = logits(model)
    merge(model, adapted)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), beside, rtol=1e-4, atol=1e-4)
    assert (beside - logits(pruned("llama_biased"))).abs().max() > 0.1


def test_a_fresh_lora_changes_nothing() -> None:
    model = pruned()
    before = logits(model)
    attach(model, QUICK, torch.Generator().manual_seed(1))
    assert torch.equal(logits(model), before)


def test_recovery_lowers_the_loss_and_keeps_the_pruned_shapes() -> None:
    model = pruned()
    shapes, count, before = shapes_of(model), num_parameters(model), mean_loss(model, WINDOWS)
    recovered = train(model)
    assert recovered.loss_after < recovered.loss_before - 0.1
    assert 0 < recovered.best_step <= QUICK.steps
    assert mean_loss(model, WINDOWS) < before - 0.1
    assert (shapes_of(model), num_parameters(model)) == (shapes, count)
    assert not model.training


def test_recovery_changes_the_weights_of_the_layers_linears_by_low_rank_and_nothing_else() -> None:
    model, before = pruned("llama_biased"), pruned("llama_biased").state_dict()
    model.requires_grad_(True)
    train(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    name = "model.layers.0.mlp.up_proj.weight"
    values = torch.linalg.svdvals(model.state_dict()[name] - before[name])
    assert values[QUICK.rank :].max() < 1e-4 * values[0]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_training_that_makes_it_worse_is_not_merged() -> None:
    model = pruned()
    train(model)
    before = logits(model)
    recovered = train(model, RecoverySettings(steps=3, learning_rate=300.0, warmup_steps=1))
    assert (recovered.best_step, recovered.digest) == (0, None)
    assert recovered.loss_after == recovered.loss_before
    assert torch.equal(logits(model), before)


def test_the_same_seed_gives_the_same_factors_and_another_others() -> None:
    short = RecoverySettings(steps=4, learning_rate=5e-3)
    first, again, other = (train(pruned(), short, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.digest != other.digest
    assert first.digest is not None
    assert first.digest.startswith("sha256:")


def test_recovery_draws_from_no_shared_generator() -> None:
    state = torch.get_rng_state()
    train(pruned(), RecoverySettings(steps=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_step_is_told() -> None:
    told: list[None] = []
    recover(pruned(), WINDOWS, RecoverySettings(steps=5), seed=0, on_step=lambda: told.append(None))
    assert len(told) == 5


def test_one_window_is_too_short_to_recover_on() -> None:
    with pytest.raises(TextError) as refused:
        recover(pruned(), WINDOWS[:1], QUICK, seed=0)
    assert refused.value.reason == "TEXT_TOO_SHORT"
