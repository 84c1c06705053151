"""S2FT as it is trained: which channels, what a step does, what is kept for the backward pass, and what is written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapters import applied
from architectures import build_checkpoint
from motley_adapters.reader import read_adapter
from motley_bases.loader import load_base, load_model
from motley_bases.spec import BaseSpec
from motley_trainer.data.batches import NOT_LEARNED, Batch, summed_loss
from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.methods.channel_linear import ChannelLinear
from motley_trainer.methods.method import Context
from motley_trainer.methods.s2ft import AttachedChannels, S2ft
from motley_trainer.methods.s2ft_scores import score_sites, weight_squares
from motley_trainer.methods.s2ft_selection import num_items, random_scores, select_items
from motley_trainer.methods.s2ft_sites import Place, Site, sites_of
from motley_trainer.spec.settings import ChannelBudget, ChannelOrder, ChannelScore, S2ftSettings
from peft_adapters import make_adapter
from torch import Tensor, nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")
EVERYWHERE = S2ftSettings(o_share=0.5, down_share=0.1, v_share=0.5, up_share=0.1)


class World:
    """A checkpoint of 3 layers of 4 query heads over 2, 16 channels a head, 96 FFN channels, and some samples."""

    def __init__(self, root: Path) -> None:
        self.path = build_checkpoint("llama", root)
        self.spec: BaseSpec = load_base(self.path, dtype="float32", device=CPU).spec

    def model(self, quantization: str = "none", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load_model(self.path, dtype, CPU, quantization)

    def context(self, seed: int = 0, adapters: tuple[Path, ...] = ()) -> Context:
        return Context(self.spec, seed, lambda count: [batch(count, seed=5)], adapters)

    def attach(self, model: PreTrainedModel, settings: S2ftSettings = EVERYWHERE, **context: Any) -> AttachedChannels:
        return S2ft(settings).attach(model, self.context(**context), None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("base"))


def batch(num_rows: int, *, seed: int, length: int = 9) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 120, (num_rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length - 3 :] = 0
    return Batch(tokens, mask, torch.where(mask.bool(), tokens, NOT_LEARNED))


def linear_of(model: nn.Module, path: str) -> nn.Linear:
    found = model.get_submodule(path)
    linear = found.base if isinstance(found, ChannelLinear) else found
    assert isinstance(linear, nn.Linear)
    return linear


# --- Which channels


@pytest.mark.parametrize(
    ("share", "total", "count"), [(0.03, 32 * 14336, 13762), (0.03, 14336, 430), (0.29, 100, 29), (0.001, 8, 1)]
)
def test_a_share_is_counted_exactly_and_is_one_at_least(share: float, total: int, count: int) -> None:
    assert num_items(share, total) == count


def test_heads_are_whole_and_under_grouped_queries_those_that_write_are_fewer(world: World) -> None:
    o, v = (sites_of(world.spec, place) for place in (Place.O_PROJ, Place.V_PROJ))
    head_dim = world.spec.layers[0].head_dim
    assert [(site.num_items, site.item_size) for site in (o[0], v[0])] == [(4, head_dim), (2, head_dim)]
    assert o[1].channels((0, 2)).tolist() == [*range(head_dim), *range(2 * head_dim, 3 * head_dim)]


def test_an_even_budget_gives_every_layer_its_share_and_a_global_one_the_share_of_all(world: World) -> None:
    sites = sites_of(world.spec, Place.DOWN_PROJ)
    free: dict[Site, frozenset[int]] = {}
    scores = random_scores(sites, seed=1)
    even = select_items(sites, scores, 0.1, ChannelBudget.LAYER, ChannelOrder.SMALL, free)
    together = select_items(sites, scores, 0.1, ChannelBudget.GLOBAL, ChannelOrder.SMALL, free)
    assert {len(items) for items in even.values()} == {9}
    assert sum(map(len, together.values())) == 28
    assert all(list(items) == sorted(set(items)) for items in (*even.values(), *together.values()))


@pytest.mark.parametrize("order", ChannelOrder)
def test_the_smallest_or_the_largest_are_taken_and_of_equals_the_first(world: World, order: ChannelOrder) -> None:
    (site, *_) = sites_of(world.spec, Place.DOWN_PROJ)
    scores = torch.ones(site.num_items)
    scores[[3, 50]] = torch.tensor([0.5, 2.0])
    chosen = select_items([site], [scores], 0.03, ChannelBudget.LAYER, order, {site: frozenset({0})})
    assert chosen == {site: (1, 3)} if order is ChannelOrder.SMALL else chosen == {site: (1, 50)}


def test_a_seed_chooses_the_same_and_another_otherwise(world: World) -> None:
    chosen = [world.attach(world.model(), seed=seed).buffers() for seed in (1, 1, 2)]
    assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])
    assert any(not torch.equal(chosen[0][name], chosen[2][name]) for name in chosen[0])


def test_other_adapters_channels_are_left_alone_until_there_are_too_few(world: World, tmp_path: Path) -> None:
    settings = S2ftSettings(o_share=0.5, down_share=0.4)
    taken: list[Path] = []
    seen: dict[str, list[int]] = {}
    for number in range(2):
        apart = replace(settings, disjoint_from=tuple(path.name for path in taken))
        attached = world.attach(world.model(), apart, seed=number, adapters=tuple(taken))
        taken.append(tmp_path / str(number))
        attached.write(taken[-1], {})
        for name, channels in attached.buffers().items():
            seen.setdefault(name, []).extend(channels.tolist())
    assert all(len(channels) == len(set(channels)) for channels in seen.values())
    with pytest.raises(SettingsError) as caught:
        world.attach(world.model(), replace(settings, disjoint_from=("0", "1")), adapters=tuple(taken))
    assert (caught.value.reason, caught.value.field) == ("NOT_ENOUGH_CHANNELS", "s2ft.o_share")


def test_what_has_no_channels_cannot_be_kept_apart_from(world: World, tmp_path: Path) -> None:
    lora = make_adapter(world.path, tmp_path / "lora", seed=1)
    asked = replace(EVERYWHERE, disjoint_from=("acme/tone@2",))
    with pytest.raises(SettingsError, match=r"^acme/tone@2 is of kind lora") as caught:
        world.attach(world.model(), asked, adapters=(lora,))
    assert (caught.value.reason, caught.value.field) == ("NOT_S2FT", "s2ft.disjoint_from[0]")


def test_a_base_without_these_linears_is_refused_by_the_share_that_asks(tmp_path: Path) -> None:
    spec = load_base(build_checkpoint("phi3", tmp_path), dtype="float32", device=CPU).spec
    assert sites_of(spec, Place.DOWN_PROJ)
    with pytest.raises(UnsuitableBaseError) as caught:
        sites_of(spec, Place.UP_PROJ)
    assert (caught.value.reason, caught.value.field) == ("NO_CHANNELS", "s2ft.up_share")


# --- Scores


@pytest.mark.parametrize("score", [score for score in ChannelScore if score is not ChannelScore.RANDOM])
@pytest.mark.parametrize("place", Place)
def test_scores_equal_a_slow_loop(world: World, score: ChannelScore, place: Place) -> None:
    model, batches = world.model(), [batch(2, seed=1), batch(3, seed=2)]
    found = score_sites(model, world.spec, sites_of(world.spec, place), score, lambda: batches)
    expected = _slow_scores(world.model(), place, score, batches)
    assert len(found) == len(expected) == 3
    for mine, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, slow, rtol=1e-4, atol=1e-6)


def _slow_scores(model: PreTrainedModel, place: Place, score: ChannelScore, batches: list[Batch]) -> list[Tensor]:
    """Score from whole tensors: weights as they are, inputs token by token, gradients by autograd of every weight."""
    found = []
    for layer in model.model.layers:
        linear = layer.self_attn.o_proj if place.of_heads else layer.mlp.down_proj
        inputs: list[Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0].detach()))
        model.requires_grad_(False)
        linear.weight.requires_grad_(True)
        linear.weight.grad = None
        for each in batches:
            summed_loss(model, each).backward()
        handle.remove()
        tokens = [
            token
            for each, of in zip(batches, inputs, strict=True)
            for row, mask in zip(of, each.attention_mask, strict=True)
            for token, is_token in zip(row, mask, strict=True)
            if is_token
        ]
        item = model.config.head_dim if place.of_heads else 1
        if place is Place.V_PROJ:  # a key-value head goes with its two query heads
            item *= 2
        gradient = linear.weight.grad
        assert gradient is not None
        scores = []
        for first in range(0, linear.in_features, item):
            span = slice(first, first + item)
            weight = linear.weight.detach()[:, span].norm()
            activation = torch.stack([token[span] for token in tokens]).norm()
            scores.append({
                ChannelScore.WEIGHT: weight,
                ChannelScore.ACTIVATION: activation,
                ChannelScore.WEIGHT_ACTIVATION: weight * activation,
                ChannelScore.GRADIENT: gradient[:, span].norm(),
            }[score])  # fmt: skip
        found.append(torch.stack(scores))
    return found


def test_a_quantized_weight_is_scored_as_its_products_say(world: World) -> None:
    quantized = linear_of(world.model("nf4"), "model.layers.0.mlp.down_proj")
    whole = linear_of(world.model(), "model.layers.0.mlp.down_proj")
    squares = weight_squares(quantized)
    torch.testing.assert_close(squares, whole.weight.detach().square().sum(0), rtol=0.3, atol=0.05)
    assert not torch.allclose(squares, whole.weight.detach().square().sum(0), rtol=1e-4)


# --- What a step does


@pytest.mark.parametrize("side", ["input", "output"])
def test_gradients_are_those_of_the_patched_weight(side: Any) -> None:
    torch.manual_seed(0)
    linear, channels = nn.Linear(12, 10), torch.tensor([1, 4, 7])
    linear.requires_grad_(False)
    sparse = ChannelLinear(linear, side, channels)
    with torch.no_grad():
        sparse.block.normal_()
    x, dy = torch.randn(2, 5, 12), torch.randn(2, 5, 10)
    mine = x.clone().requires_grad_()
    y = sparse(mine)
    y.backward(dy)
    patched = linear.weight.detach().clone()
    patched.index_add_(1 if side == "input" else 0, channels, sparse.block.detach())
    patched.requires_grad_()
    dense = x.clone().requires_grad_()
    expected = nn.functional.linear(dense, patched, linear.bias)
    expected.backward(dy)
    assert patched.grad is not None
    wanted = patched.grad[:, channels] if side == "input" else patched.grad[channels]
    for found, right in ((y, expected), (mine.grad, dense.grad), (sparse.block.grad, wanted)):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_is_added_to_a_bfloat16_base_is_rounded_once(side: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=False, dtype=torch.bfloat16)
    sparse = ChannelLinear(linear, side, channels := torch.tensor([1, 4, 5, 17]))
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        sparse.block.normal_(generator=torch.Generator().manual_seed(2))
        expected = linear(x).float()
        if side == "input":
            expected += x[:, channels].float() @ sparse.block.T
        else:
            expected[:, channels] += x.float() @ sparse.block.T
        assert torch.equal(sparse(x), expected.bfloat16())


def test_twenty_steps_equal_full_fine_tuning_under_a_mask(world: World) -> None:
    model, dense = world.model(), world.model()
    attached = world.attach(model)
    optimizer = torch.optim.AdamW(attached.parameters.values(), lr=1e-3, weight_decay=0.0)
    masks = {}
    dense.requires_grad_(False)
    for path, linear in attached._linears.items():
        weight = linear_of(dense, path).weight.requires_grad_()
        masks[path] = torch.zeros_like(weight).index_fill_(1 if linear.side == "input" else 0, linear.channels, 1.0)
    full = torch.optim.AdamW([linear_of(dense, path).weight for path in masks], lr=1e-3, weight_decay=0.0)
    before = {path: linear_of(dense, path).weight.detach().clone() for path in masks}
    for step in range(20):
        for each, what in ((model, optimizer), (dense, full)):
            what.zero_grad()
            summed_loss(each, batch(4, seed=step)).backward()
            if each is dense:
                for path, mask in masks.items():
                    gradient = linear_of(dense, path).weight.grad
                    assert gradient is not None
                    gradient.mul_(mask)
            what.step()
    for path, linear in attached._linears.items():
        changed = linear_of(dense, path).weight.detach() - before[path]
        axis = 1 if linear.side == "input" else 0
        torch.testing.assert_close(
            linear.block.detach(), changed.index_select(axis, linear.channels), rtol=0, atol=1e-5
        )
        assert linear.block.detach().abs().max() > 1e-3


def test_four_small_batches_make_the_gradient_of_one(world: World) -> None:
    model = world.model()
    attached = world.attach(model)
    whole = batch(8, seed=3)
    summed_loss(model, whole).backward()
    once = [parameter.grad.clone() for parameter in attached.parameters.values() if parameter.grad is not None]
    model.zero_grad()
    for rows in range(0, 8, 2):
        part = slice(rows, rows + 2)
        summed_loss(model, Batch(whole.input_ids[part], whole.attention_mask[part], whole.labels[part])).backward()
    assert len(once) == len(attached.parameters)
    for mine, parameter in zip(once, attached.parameters.values(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("quantization", "dtype"), [("none", torch.bfloat16), ("nf4", torch.float32)])
def test_the_base_is_bit_for_bit_what_it_was(world: World, quantization: str, dtype: torch.dtype) -> None:
    model, untouched = world.model(quantization, dtype), world.model(quantization, dtype)
    attached = world.attach(model)
    optimizer = torch.optim.AdamW(attached.parameters.values(), lr=0.1)
    with torch.no_grad():
        before = model(input_ids=batch(2, seed=0).input_ids).logits
    for step in range(3):
        summed_loss(model, batch(2, seed=step)).backward()
        optimizer.step()
    with torch.no_grad(), attached.disabled():
        assert torch.equal(model(input_ids=batch(2, seed=0).input_ids).logits, before)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=batch(2, seed=0).input_ids).logits, before)
    for path, linear in attached._linears.items():
        assert torch.equal(linear.base.weight, linear_of(untouched, path).weight)


# --- What is written


def test_what_is_written_does_what_was_trained(world: World, tmp_path: Path) -> None:
    model = world.model()
    attached = world.attach(model)
    with torch.no_grad():
        for parameter in attached.parameters.values():
            parameter.normal_(std=0.3)
    digest = attached.write(tmp_path / "out", {"seed": 0})
    adapter = read_adapter(tmp_path / "out", world.spec)
    assert (adapter.spec.digest, adapter.spec.kind) == (digest, "s2ft")
    tokens = batch(2, seed=9).input_ids
    other = world.model()
    with torch.no_grad(), applied(other, (adapter, 1.0)):
        torch.testing.assert_close(other(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_has_the_channels_of_its_checkpoint(world: World) -> None:
    first = world.attach(world.model(), seed=1)
    kept = copy.deepcopy(dict(first.buffers()))
    again = S2ft(EVERYWHERE).attach(world.model(), world.context(seed=2), kept)
    assert list(again.parameters) == list(first.parameters)
    assert all(torch.equal(kept[name], found) for name, found in again.buffers().items())


@pytest.mark.parametrize("budget", ChannelBudget)
def test_the_shares_that_are_told_are_those_that_whole_heads_and_channels_come_to(
    world: World, budget: ChannelBudget
) -> None:
    asked = S2ftSettings(o_share=0.001, down_share=1e-320, v_share=0.5, budget=budget)
    facts = world.attach(world.model(), asked).facts()
    layers = 3 if budget is ChannelBudget.GLOBAL else 1
    assert facts["shares"] == {"o_proj": 1 / (4 * layers), "down_proj": 1 / (96 * layers), "v_proj": 0.5}
