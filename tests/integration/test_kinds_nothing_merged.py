"""Serving any kind or fusion edits no base weight, builds no merged one, and calls each base Linear once a step."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from hypothesis import given, settings
from hypothesis import strategies as st
from kind_sets import KINDS, SETS, make_kinds
from motley_server.engine.types import GenerateRequest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Sizes that no batch, rank or stack of adapters here comes to by chance.
SIZES = {"hidden_size": 148, "intermediate_size": 212, "head_dim": 38, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama") / "base", **SIZES)


@pytest.fixture(scope="module")
def paths(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_kinds(checkpoint, tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def harness(checkpoint: Path, paths: dict[str, Path]) -> Harness:
    return make_harness(checkpoint, paths, block_size=4, token_budget=72, max_running=16)


def wave(harness: Harness, *, max_new_tokens: int = 5) -> list[GenerateRequest]:
    """Ask once under every set, with prompts of one chunk and of several tokens a step."""
    rng = random.Random(1)
    return [
        harness.request(
            name,
            [rng.randrange(10, 200) for _ in range(3 + 4 * (place % 4))],
            *members,
            max_new_tokens=max_new_tokens,
            stop_token_ids=(),
        )
        for place, (name, members) in enumerate(SETS.items())
    ]


def checksums(harness: Harness) -> dict[str, str]:
    """Digest every parameter and buffer of the base."""
    state: Mapping[str, Tensor] = harness.base.model.state_dict(keep_vars=True)
    return {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in state.items()}


class MergedWeightWatch(TorchDispatchMode):
    """Note every operation that makes a tensor of a Linear's shape, or many of them, in memory of its own."""

    def __init__(self, harness: Harness) -> None:
        super().__init__()
        sides = harness.base.spec.linears.values()
        self._shapes = {shape for inputs, outputs in sides for shape in ((inputs, outputs), (outputs, inputs))}
        self._sizes = {inputs * outputs for inputs, outputs in sides}
        self.seen = Counter[tuple[int, ...]]()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if not isinstance(made, Tensor) or not made.is_floating_point():
                continue
            self.seen[tuple(made.shape)] += 1
            is_view = made.untyped_storage().data_ptr() in given
            if not is_view and (tuple(made.shape[-2:]) in self._shapes or made.numel() in self._sizes):
                self.found.append(f"{func} makes {tuple(made.shape)}")
        return result


@contextmanager
def counting_calls(harness: Harness) -> Iterator[Counter[str]]:
    """Count calls of each base Linear itself, inside its adapter site."""
    calls = Counter[str]()
    hooks = [
        harness.base.model.get_submodule(f"{path}.base").register_forward_hook(
            lambda *_, path=path: calls.update([path])
        )
        for path in harness.base.spec.linears
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def test_base_weights_are_the_same_bytes_after_every_kind_and_fusion(harness: Harness) -> None:
    before = checksums(harness)
    answers = harness.run(wave(harness))
    assert len({tuple(answer.token_ids[0]) for answer in answers.values()}) > len(KINDS)
    assert checksums(harness) == before
    assert len(before) >= len(harness.base.spec.linears)


def test_no_step_makes_a_tensor_of_a_linear_s_shape(harness: Harness) -> None:
    watch = MergedWeightWatch(harness)
    steps = len(harness.observer.steps)
    requests = wave(harness)
    with watch:
        harness.run(requests)
    assert watch.found == []
    assert watch.seen, "the watch saw nothing"
    assert max(step.num_distinct_adapters for step in harness.observer.steps[steps:]) == len(KINDS)


def test_the_watch_sees_a_merged_weight(harness: Harness) -> None:
    weight = harness.base.tensor("model.layers.0.mlp.up_proj.weight")
    outputs, inputs = weight.shape
    with MergedWeightWatch(harness) as transposed:
        _ = weight.T @ torch.ones(outputs, 3)
    assert transposed.found == []
    for merge in (
        lambda: torch.ones(outputs, 2) @ torch.ones(2, inputs),
        lambda: torch.ones(3, inputs, 2) @ torch.ones(3, 2, outputs),
        lambda: weight + 1,
    ):
        with MergedWeightWatch(harness) as watch:
            merge()
        assert len(watch.found) == 1


def test_each_base_linear_is_called_once_a_step_with_all_kinds_present(harness: Harness) -> None:
    before, steps = harness.core.runner.num_forward_passes, len(harness.observer.steps)
    with counting_calls(harness) as calls:
        harness.run(wave(harness, max_new_tokens=12))
    num_passes = harness.core.runner.num_forward_passes - before
    assert set(calls) == set(harness.base.spec.linears)
    assert set(calls.values()) == {num_passes}
    full = [step for step in harness.observer.steps[steps:] if step.num_sequences == len(SETS)]
    assert len(full) >= 5
    assert all(step.num_distinct_adapters == len(KINDS) for step in full)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_neighbours_of_any_kind_change_nobody_s_answer(harness: Harness, data: st.DataObject) -> None:
    drawn = st.tuples(st.integers(1, 20), st.sampled_from(sorted(SETS)), st.booleans())
    shapes = data.draw(st.lists(drawn, min_size=2, max_size=9))

    def make(index: int) -> GenerateRequest:
        length, name, is_sampled = shapes[index]
        rng = random.Random(index)
        return harness.request(
            str(index),
            [rng.randrange(10, 200) for _ in range(length)],
            *SETS[name],
            max_new_tokens=5,
            temperature=0.9 if is_sampled else 0.0,
            seed=index,
            stop_token_ids=(),
        )

    def tokens(indices: list[int]) -> dict[str, list[int]]:
        return {key: answer.token_ids[0] for key, answer in harness.run(make(one) for one in indices).items()}

    order = data.draw(st.permutations(range(len(shapes))))
    together = tokens(list(range(len(shapes))))
    assert tokens(list(order)) == together
    fewer = list(order[: data.draw(st.integers(1, len(shapes)))])
    assert tokens(fewer) == {str(index): together[str(index)] for index in fewer}
    assert tokens(fewer[:1]) == {str(fewer[0]): together[str(fewer[0])]}
