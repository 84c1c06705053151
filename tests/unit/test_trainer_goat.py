"""GOAT as it begins and as it is trained: what experts start from on each base, and what a step does and counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from motley_adapters.kinds.goat_init import expert_directions
from motley_bases.loader import load_model
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.job.loop import set_training
from motley_trainer.methods.goat_start import geometry_of, scale_of
from motley_trainer.methods.product_weight import product_weight
from motley_trainer.spec.settings import GoatScale, GoatScaleRank, GoatSegments, GoatSettings, derived_seed
from quantized_bases import meant_weight
from small_goats import MASK, PADDED, SETTINGS, TOKENS, attach, disturb, goats, logits, small_model, trained_on
from torch import Tensor, nn

CPU = torch.device("cpu")
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


# --- Where it begins


@pytest.mark.parametrize("segments", list(GoatSegments))
def test_experts_begin_as_slices_over_rho_and_the_residual_is_their_mean(segments: GoatSegments) -> None:
    settings = replace(SETTINGS, segments=segments)
    model = small_model()
    attach(model, settings, seed=5)
    assert len(goats(model)) == 21
    for path in (Q0, DOWN1):
        goat = goats(model)[path]
        left, values, right = torch.linalg.svd(goat.base.weight, full_matrices=False)
        generator = torch.Generator().manual_seed(derived_seed(5, "segments", path))
        directions = expert_directions(geometry_of(settings), *reversed(goat.base.weight.shape), generator)
        mean = torch.zeros_like(goat.base.weight)
        for expert, chosen in enumerate(directions):
            rows = slice(2 * expert, 2 * expert + 2)
            wanted = left[:, chosen] @ values[chosen].diag() @ right[chosen] / 10
            torch.testing.assert_close(goat.scale * goat.goat_b[:, rows] @ goat.goat_a[rows], wanted, rtol=0, atol=1e-5)
            mean += wanted / 4
        found = geometry_of(settings).residual_scaling * goat.residual_b @ goat.residual_a
        torch.testing.assert_close(found, -mean, rtol=0, atol=1e-5)


def test_routers_begin_as_linears_do_and_by_the_seed() -> None:
    model, again, other = small_model(), small_model(), small_model()
    for place, seed in ((model, 1), (again, 1), (other, 2)):
        attach(place, seed=seed)
    for path, goat in goats(model).items():
        bound = 1 / math.sqrt(goat.base.in_features)
        assert 0.95 * bound < float(goat.router.detach().abs().max()) <= bound
        assert torch.equal(goat.router, goats(again)[path].router)
        assert not torch.equal(goat.router, goats(other)[path].router)


@pytest.mark.parametrize(
    ("settings", "inputs", "wanted"),
    [
        (GoatSettings(), 4096, 110.9),
        (GoatSettings(rank_for_scale=GoatScaleRank.TOTAL), 4096, 39.2),
        (GoatSettings(rank=32, eta=0.1), 4096, 17.5),
        (GoatSettings(), 11008, 181.7),
        (GoatSettings(scale=GoatScale.ALPHA, alpha=16.0), 4096, 16.0),
        (GoatSettings(scale=GoatScale.ALPHA, rank=32, alpha=64.0), 11008, 16.0),
    ],
)
def test_the_scale_of_each_linear(settings: GoatSettings, inputs: int, wanted: float) -> None:
    assert scale_of(settings, inputs) == pytest.approx(wanted, abs=0.06)


def test_the_theoretical_scale_differs_between_linears() -> None:
    model = small_model()
    attach(model)
    scales = {goat.base.in_features: goat.scale for goat in goats(model).values()}
    assert scales == {inputs: pytest.approx(math.sqrt(3 * inputs / 2)) for inputs in (64, 96)}


def test_a_fresh_mixture_is_the_base_where_every_expert_has_the_same_share() -> None:
    model = small_model()
    before = logits(model)
    attach(model, replace(SETTINGS, top_k=4))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with torch.no_grad():
        for goat in goats(model).values():
            goat.router.zero_()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("qwen2", tmp_path_factory.mktemp("base"))  # whose q, k and v have biases


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_of_a_quantized_base_the_spectrum_is_that_of_what_it_stands_for(checkpoint: Path, method: str) -> None:
    model = load_model(checkpoint, torch.float32, CPU, method)
    meant = {path: meant_weight(model.get_submodule(path)) for path in (Q0, DOWN1)}
    for path, weight in meant.items():
        torch.testing.assert_close(product_weight(model.get_submodule(path)), weight, rtol=1e-6, atol=1e-7)
    attached = attach(model, replace(SETTINGS, target_modules=(Q0, DOWN1)), quantization=method)
    for path, goat in goats(model).items():
        values = torch.linalg.svdvals(meant[path])
        starts = [expert * (len(values) // 4) + place for expert in range(4) for place in range(2)]
        torch.testing.assert_close(goat.residual_a.norm(dim=1) ** 2, values[starts], rtol=1e-4, atol=1e-5)
    assert attached.facts()["spectrum"] == f"float32 SVD of the dequantized {method} weights"


@pytest.mark.parametrize("method", ["none", "nf4", "int8"])
def test_a_weight_in_bfloat16_is_taken_to_its_last_bit(checkpoint: Path, method: str) -> None:
    linear = load_model(checkpoint, torch.bfloat16, CPU, method).get_submodule(Q0)
    assert isinstance(linear, nn.Linear)
    assert linear.bias.any()
    with torch.no_grad():
        linear.bias.fill_(1000.0)  # beside which a weight would be lost
    weight = product_weight(linear)
    assert weight.dtype == torch.float32
    wanted = linear.weight.float() if method == "none" else meant_weight(linear)
    torch.testing.assert_close(weight, wanted, rtol=2**-8, atol=1e-6)
    assert float(weight.abs().median()) > 0.001


# --- What a step does


def test_nothing_but_experts_and_routers_is_trained_and_none_of_them_is_left_out() -> None:
    model = small_model()
    attached = attach(model)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in attached.parameters.values()}
    assert len(trained) == 3 * 21
    set_training(model, attached, True)
    (summed_loss(model, PADDED) + (attached.extra_loss(PADDED) or 0)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in attached.parameters.values())


def test_the_loss_added_is_of_every_linear_and_of_tokens_alone() -> None:
    """What stands in the padding, and how much of it there is, changes neither the loss nor the counts."""
    model = small_model()
    attached = attach(model, replace(SETTINGS, balance_loss=0.5, dropout=0.0))
    extra = trained_on(model, attached, PADDED)
    counted = attached.buffers()["picks"].clone()
    assert counted.sum(1).tolist() == [2 * 14] * 21
    assert extra is not None
    assert 0.5 * 21 < float(extra.detach()) < 0.5 * 21 * 2  # evenly spread, each would be 1

    alone = small_model()
    apart = attach(alone, replace(SETTINGS, balance_loss=0.5, dropout=0.0))
    likely: dict[str, list[Tensor]] = {path: [] for path in goats(alone)}
    for row, length in ((0, 9), (1, 5)):
        set_training(alone, apart, True)
        logits(alone, TOKENS[row : row + 1, :length])
        for path, goat in goats(alone).items():
            likely[path].append(goat.take_routed().logits.softmax(1))
    wanted = sum(
        (4 * counts / 28 * torch.cat(of_path).mean(0)).sum()
        for counts, of_path in zip(counted, likely.values(), strict=True)
    )
    assert float(extra.detach()) == pytest.approx(0.5 * float(wanted), rel=1e-4)

    wider = Batch(
        torch.cat([TOKENS.masked_fill(MASK == 0, 7), torch.full((2, 3), 8)], 1),
        torch.cat([MASK, torch.zeros(2, 3, dtype=torch.long)], 1),
        torch.cat([PADDED.labels, torch.full((2, 3), -100)], 1),
    )
    again = trained_on(model, attached, wider)
    assert again is not None
    assert float(again.detach()) == pytest.approx(float(extra.detach()), rel=1e-5)
    assert torch.equal(attached.buffers()["picks"], 2 * counted)


def test_without_a_coefficient_nothing_is_added_and_tokens_are_counted_still() -> None:
    model = small_model()
    attached = attach(model, replace(SETTINGS, balance_loss=0.0))
    assert trained_on(model, attached, PADDED) is None
    assert attached.buffers()["picks"].sum(1).tolist() == [28] * 21


def test_lm_head_is_trained_by_the_tokens_that_it_is_given() -> None:
    model = small_model()
    attached = attach(model, replace(SETTINGS, target_modules=("lm_head",)))
    labels = PADDED.labels.clone()
    labels[:, :4] = -100  # then only the positions from the fourth on have logits
    assert trained_on(model, attached, replace(PADDED, labels=labels)) is not None
    assert attached.buffers()["picks"].sum().item() == 2 * (5 + 2)


def test_a_token_routes_alike_alone_and_beside_others() -> None:
    model = small_model()
    attached = attach(model, replace(SETTINGS, dropout=0.0))
    routes = []
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:1, :6]):
        set_training(model, attached, True)
        logits(model, tokens)
        routes.append({path: goat.take_routed().chosen for path, goat in goats(model).items()})
    for path, chosen in routes[0].items():
        assert torch.equal(routes[1][path], chosen[:9])
        assert torch.equal(routes[2][path], chosen[:6])
    assert len({tuple(chosen.flatten().tolist()) for chosen in routes[0].values()}) > 1  # each Linear has its own


def test_what_is_evaluated_is_neither_dropped_nor_counted() -> None:
    model = small_model()
    attached = attach(model, replace(SETTINGS, dropout=0.5))
    expected, state = logits(model), attached.buffers()
    assert torch.equal(logits(model), expected)
    assert not attached.buffers()["picks"].any()
    assert torch.equal(attached.buffers()["dropout_state"], state["dropout_state"])
    set_training(model, attached, True)
    assert not torch.equal(logits(model), logits(model))


def test_a_disabled_one_is_the_base_alone() -> None:
    model = small_model()
    before = logits(model)
    attached = attach(model)
    disturb(attached)
    with attached.disabled():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(model), before, atol=0.1)
