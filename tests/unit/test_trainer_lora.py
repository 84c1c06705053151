"""A LoRA is trained as PEFT trains one, on whole and quantized bases, and what is written is what was trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_files import FINGERPRINT, spec_of, tiny_spec
from applied_adapters import applied
from architectures import build_checkpoint, build_model
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_model
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.errors import SettingsError
from motley_trainer.job.loop import set_training
from motley_trainer.job.schedule import rate
from motley_trainer.methods.lora import AttachedLora, Lora, Target, resolve_targets
from motley_trainer.methods.lora_linear import LoraLinear
from motley_trainer.methods.method import Context
from motley_trainer.spec.settings import LoraSettings, OptimizerSettings
from small_trainings import SPEC, VOCABULARY, SmallTraining, random_data
from torch import Tensor, nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")
TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(9))
LEARNED = Batch(TOKENS, torch.ones_like(TOKENS), TOKENS)


def attach(model: PreTrainedModel, settings: LoraSettings = LoraSettings(rank=3), **more: Any) -> AttachedLora:  # noqa: B008
    model.requires_grad_(False)
    return Lora(settings).attach(model, Context(spec_of(model), 0, lambda count: []), more.get("resumed"))


def disturb(attached: AttachedLora) -> None:
    """Move every factor away from what it began with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in attached.parameters.values():
            factor.add_(torch.randn(factor.shape, generator=generator) * 0.05)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


def quietly(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of tied weights and of transformers
        return call(*arguments, **keywords)


# --- As PEFT trains it

OPTIMIZER = OptimizerSettings(learning_rate=2e-4)
PATTERNED = LoraSettings(
    rank=3,
    alpha=5.0,
    use_rslora=True,
    target_modules=("q_proj", "up_proj", "down_proj"),
    rank_pattern={"up_proj": 2},
    alpha_pattern={"model.layers.1.mlp.down_proj": 9.0},
)


@pytest.mark.parametrize("settings", [LoraSettings(rank=3, alpha=6.0), PATTERNED], ids=["plain", "patterned"])
def test_ten_steps_give_the_factors_that_peft_and_torch_give(settings: LoraSettings, tmp_path: Path) -> None:
    # A step moves an element by the learning rate, by the sign of a gradient that may be all rounding.
    spec = replace(SPEC, settings=settings, micro_batch_size=3, optimizer=OPTIMIZER)
    ours, theirs = SmallTraining(spec), _peft_model(settings)
    _start_as(theirs, SmallTraining(spec).attach())
    ours.train(tmp_path)
    _train_with_torch(theirs)
    modules = dict(theirs.base_model.model.named_modules())
    for name, factor in ours.attached.parameters.items():
        path, _, letter = name.rpartition(".lora_")
        module = getattr(modules[path], f"lora_{letter.upper()}")["default"]
        torch.testing.assert_close(factor.detach(), module.weight.detach(), rtol=0, atol=1e-6)
        assert factor.abs().max() > 1e-3


def _peft_model(settings: LoraSettings) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        target_modules=list(settings.target_modules) or "all-linear",
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
    )
    return quietly(peft.get_peft_model, build_model("llama", vocab_size=VOCABULARY), config)


@torch.no_grad()
def _start_as(theirs: Any, ours: Any) -> None:
    found = 0
    for path, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_A["default"].weight.copy_(ours.parameters[f"{path}.lora_a"])
            found += 2
    assert found == len(ours.parameters)


def _train_with_torch(model: Any) -> None:
    """Train by transformers' own loss, with all samples of a step in one batch."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    data = random_data()
    for step in range(10):
        (batch,) = data.step(step, 4, 4)
        optimizer.param_groups[0]["lr"] = rate(OPTIMIZER, step, 10)
        optimizer.zero_grad()
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()


def test_the_factors_begin_as_pefts_do() -> None:
    drawn = torch.Generator().manual_seed(4)
    ours = LoraLinear(nn.Linear(20, 30), rank=5, scaling=1.0, initial=drawn)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        theirs = torch.empty(5, 20)
        nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert torch.equal(ours.lora_a, theirs)
    assert not ours.lora_b.any()


# --- What is written


def test_what_is_written_loads_in_peft_and_here_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = build_model("llama", vocab_size=VOCABULARY)
    attached = attach(model, PATTERNED)
    disturb(attached)
    digest = attached.write(tmp_path / "out", {"job": "job-1"})
    expected, plain = logits(model), build_model("llama", vocab_size=VOCABULARY)
    assert (expected - logits(plain)).abs().max() > 0.1

    adapter = read_adapter(tmp_path / "out", spec_of(plain))
    assert adapter.spec.digest == digest
    with applied(plain, (adapter, 1.0)):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a key that PEFT misses or does not expect is a warning there
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_binds_it_to_its_base_and_says_how_it_was_made(tmp_path: Path) -> None:
    attached = attach(build_model("llama", vocab_size=VOCABULARY))
    digest = attached.write(tmp_path / "out", {"job": "job-1"})
    manifest = json.loads((tmp_path / "out" / "motley_manifest.json").read_text())
    assert manifest == {
        "schema_version": 1,
        "kind": "lora",
        "trained_on": FINGERPRINT,
        "serves_on": FINGERPRINT,
        "digest": digest,
        "provenance": {
            "job": "job-1",
            "num_trained_parameters": sum(factor.numel() for factor in attached.parameters.values()),
            "num_modules": 21,
        },
    }


# --- Which Linears, at which rank and scale

Q0, K0, UP0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LoraSettings(2, 6.0), {Q0: Target(2, 3.0), K0: Target(2, 3.0), UP0: Target(2, 3.0)}),
        (LoraSettings(2, 6.0, target_modules=("q_proj", UP0)), {Q0: Target(2, 3.0), UP0: Target(2, 3.0)}),
        (LoraSettings(1, 6.0, target_modules=("lm_head",)), {"lm_head": Target(1, 6.0)}),
        (LoraSettings(2, 6.0, target_modules=("self_attn.q_proj",)), {Q0: Target(2, 3.0)}),
        (LoraSettings(4, 6.0, True, ("q_proj",)), {Q0: Target(4, 3.0)}),
        (
            # The longest key counts; alpha is divided by the module's own rank.
            LoraSettings(
                2, 6.0, False, ("q_proj", "k_proj"),
                {"q_proj": 3, "self_attn.q_proj": 4, "k_proj": 1}, {Q0: 2.0, "q_proj": 9.0},
            ),
            {Q0: Target(4, 0.5), K0: Target(1, 6.0)},
        ),
    ],
)  # fmt: skip
def test_names_paths_and_patterns_mean_what_they_do_in_peft(
    settings: LoraSettings, expected: dict[str, Target]
) -> None:
    assert resolve_targets(settings, tiny_spec()) == expected


@pytest.mark.parametrize(
    ("settings", "reason", "field"),
    [
        (LoraSettings(1, target_modules=("proj",)), "NO_SUCH_MODULE", "lora.target_modules"),
        (LoraSettings(1, target_modules=("q_proj", "embed_tokens")), "NO_SUCH_MODULE", "lora.target_modules"),
        (LoraSettings(1, rank_pattern={"v_proj": 1}), "NO_SUCH_MODULE", "lora.rank_pattern"),
        (
            LoraSettings(1, target_modules=("q_proj",), alpha_pattern={"k_proj": 1.0}),
            "NO_SUCH_MODULE",
            "lora.alpha_pattern",
        ),
        (LoraSettings(3), "RANK_TOO_LARGE", "lora.rank"),
        (
            LoraSettings(2, rank_pattern={Q0: 5}),
            "RANK_TOO_LARGE",
            f'lora.rank_pattern["{Q0}"]',
        ),
    ],
)
def test_what_names_nothing_and_what_is_too_large_is_refused(settings: LoraSettings, reason: str, field: str) -> None:
    with pytest.raises(SettingsError) as refused:
        resolve_targets(settings, tiny_spec())
    assert (refused.value.reason, refused.value.field) == (reason, field)


# --- Inside a model


def test_a_fresh_lora_changes_nothing_and_a_disabled_one_neither() -> None:
    model = build_model("llama", vocab_size=VOCABULARY)
    before = logits(model)
    attached = attach(model)
    assert torch.equal(logits(model), before)
    disturb(attached)
    assert not torch.allclose(logits(model), before)
    with attached.disabled():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before)


def test_nothing_but_the_factors_is_trained_and_none_of_them_is_left_out() -> None:
    model = build_model("llama_tied", vocab_size=VOCABULARY)
    attached = attach(model)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(factor) for factor in attached.parameters.values()}
    assert len(trained) == 2 * 7 * 3
    assert list(attached.parameters) == list(attach(build_model("llama_tied", vocab_size=VOCABULARY)).parameters)


def test_dropout_drops_in_training_alone_and_from_a_generator_of_its_own() -> None:
    model = build_model("llama", vocab_size=VOCABULARY)
    attached = attach(model, LoraSettings(rank=3, dropout=0.5))
    disturb(attached)
    shared = torch.get_rng_state()
    expected = logits(model)
    assert torch.equal(logits(model), expected)
    set_training(model, attached, True)
    state = attached.buffers()["dropout_state"].clone()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), shared)
    again = build_model("llama", vocab_size=VOCABULARY)
    resumed = attach(again, LoraSettings(rank=3, dropout=0.5), resumed={"dropout_state": state})
    disturb(resumed)
    set_training(again, resumed, True)
    assert torch.equal(logits(again), first)
    set_training(model, attached, False)
    assert torch.equal(logits(model), expected)


def test_dropout_keeps_the_mean_and_its_gradient_is_of_what_stayed() -> None:
    lora = LoraLinear(
        nn.Linear(64, 8),
        rank=4,
        scaling=2.0,
        initial=torch.Generator().manual_seed(0),
        dropout=0.25,
        drops=torch.Generator().manual_seed(1),
    ).train()
    lora.base.requires_grad_(False)
    nn.init.normal_(lora.lora_b, generator=torch.Generator().manual_seed(2))
    x = torch.ones(4000, 64, requires_grad=True)
    added = lora(x) - lora.base(x)
    with torch.no_grad():
        whole = 2.0 * x[:1] @ lora.lora_a.T @ lora.lora_b.T
    torch.testing.assert_close(added.detach().mean(0, keepdim=True), whole, rtol=0.2, atol=0.1)
    lora(x).sum().backward()
    assert x.grad is not None
    of_base = lora.base.weight.sum(0)
    share = ((x.grad - of_base).abs() < 1e-4).float().mean()
    assert 0.2 < float(share) < 0.3  # what was dropped has the base's gradient alone


def test_the_backward_pass_keeps_the_inputs_that_it_was_given_and_no_copy() -> None:
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    linears = [nn.Linear(16, 12, bias=False).to(torch.bfloat16).requires_grad_(False) for _ in range(2)]
    initial = torch.Generator().manual_seed(0)
    loras = [LoraLinear(linear, rank=2, scaling=1.0, initial=initial) for linear in linears]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        for lora in loras:
            assert lora(x).dtype == torch.bfloat16
    large = {tensor.data_ptr(): tensor.shape for tensor in kept if tensor.shape[0] == len(x) and tensor.shape[1] > 2}
    assert set(large) == {x.data_ptr()}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_that_autograd_finds(dropout: float) -> None:
    def made() -> LoraLinear:
        lora = LoraLinear(
            nn.Linear(10, 7).requires_grad_(False),
            rank=3,
            scaling=0.5,
            initial=torch.Generator().manual_seed(0),
            dropout=dropout,
            drops=torch.Generator().manual_seed(1),
        ).train()
        nn.init.normal_(lora.lora_b, generator=torch.Generator().manual_seed(2))
        return lora

    torch.manual_seed(0)
    x, weights = torch.randn(2, 4, 10, requires_grad=True), torch.randn(2, 4, 7)
    lora = made()
    (lora(x) * weights).sum().backward()
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= dropout
    a, b, again = (tensor.detach().clone().requires_grad_() for tensor in (lora.lora_a, lora.lora_b, x))
    expected = lora.base(again) + 0.5 * ((again * drawn / (1 - dropout)) @ a.T) @ b.T
    (expected * weights).sum().backward()
    for found, wanted in ((x, again), (lora.lora_a, a), (lora.lora_b, b)):
        torch.testing.assert_close(found.grad, wanted.grad)


# --- On quantized bases


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_gradients_on_a_quantized_base_are_those_of_the_base_that_it_stands_for(
    checkpoint: Path, method: str, dtype: torch.dtype
) -> None:
    """The reference is a whole model whose weights are what the quantized Linears multiply by."""
    quantized = load_model(checkpoint, dtype, CPU, method)
    whole = load_model(checkpoint, dtype, CPU, "none")
    with torch.no_grad():
        for path, linear in whole.named_modules():
            if isinstance(linear, nn.Linear) and path != "lm_head":
                twin = quantized.get_submodule(path)
                linear.weight.copy_(twin(torch.eye(linear.in_features, dtype=dtype)).T)
    gradients = []
    for model in (quantized, whole):
        attached = attach(model)
        disturb(attached)
        set_training(model, attached, True)
        summed_loss(model, LEARNED).backward()
        gradients.append({name: factor.grad for name, factor in attached.parameters.items()})
    for name, wanted in gradients[1].items():
        found = gradients[0][name]
        assert found is not None
        assert wanted is not None
        tolerance = 1e-4 if dtype == torch.float32 else 8e-2
        assert float((found - wanted).norm()) <= tolerance * float(wanted.norm()), name
        assert float(wanted.norm()) > 0


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_training_leaves_a_quantized_base_as_it_is(checkpoint: Path, method: str) -> None:
    model = load_model(checkpoint, torch.float32, CPU, method)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    attached = attach(model)
    set_training(model, attached, True)
    summed_loss(model, LEARNED).backward()
    torch.optim.AdamW(attached.parameters.values(), lr=0.1).step()
    set_training(model, attached, False)
    assert not torch.allclose(logits(model), expected)
    with attached.disabled():
        assert torch.equal(logits(model), expected)
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
