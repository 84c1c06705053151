"""Adapters of every kind over NF4 and INT8 bases: answers by definition, alone as together, whoever the neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from kind_definitions import define
from kind_sets import KINDS, SETS, make_kinds
from motley_bases.loader import load_base
from motley_bases.quantization import quantized_linears
from peft_adapters import greedy_answers, make_adapter
from quantized_bases import METHODS, quantized_model, write_meant

CPU = torch.device("cpu")
NEW_TOKENS = 6
Answer = tuple[list[int], list[float]]


def draw_prompts(*lengths: int, seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, 200) for _ in range(length)] for length in lengths]


PROMPTS = draw_prompts(3, 19)


class World:
    """One quantized base with adapters of every kind, and the whole model that its weights stand for."""

    def __init__(self, method: str, root: Path) -> None:
        self.method = method
        self.checkpoint = build_checkpoint("llama", root / "base")
        self.meant = write_meant(self.checkpoint, method, root / "meant")
        self.paths = make_kinds(self.checkpoint, root)
        self.paths["loud"] = make_adapter(self.checkpoint, root / "loud", seed=9, strength=60.0)
        self.base = load_base(self.checkpoint, dtype="float32", device=CPU, quantize=method)
        self.harness: Harness = make_harness(
            self.checkpoint, self.paths, base=self.base, block_size=4, token_budget=40, max_running=32
        )

    def ask(self, *sets: str, beside: tuple[str, ...] = ()) -> dict[tuple[str, int], Answer]:
        """Answer every prompt under each set in one wave, and other adapters' requests among them."""
        asked = [(name, index) for name in (*sets, *beside) for index in range(len(PROMPTS))]
        random.Random(3).shuffle(asked)
        requests = [
            self.harness.request(
                f"{name}/{index}",
                PROMPTS[index],
                *SETS.get(name, ((name, 1.0),)),
                max_new_tokens=NEW_TOKENS,
                logprobs=0,
                stop_token_ids=(),
            )
            for name, index in asked
        ]
        answers = self.harness.run(requests)
        return {
            (name, index): (
                answers[f"{name}/{index}"].token_ids[0],
                [entry.logprob for entry in answers[f"{name}/{index}"].logprobs[0]],
            )
            for name, index in asked
        }


@pytest.fixture(scope="module", params=METHODS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(found: Answer, expected: Answer, what: object) -> None:
    assert found[0] == expected[0], what
    assert found[1] == pytest.approx(expected[1], abs=1e-4), what


def test_every_kind_in_one_batch_answers_by_its_definition_on_the_quantized_base(world: World) -> None:
    before = len(world.harness.observer.steps)
    together = world.ask(*SETS)
    for name, members in SETS.items():
        definition = define(world.meant, [(world.paths[member], weight) for member, weight in members])
        definition.model.generation_config.eos_token_id = None
        expected = greedy_answers(definition.model, PROMPTS, max_new_tokens=NEW_TOKENS)
        for index, answer in enumerate(expected):
            assert_same(together[name, index], answer, (name, index))
    steps = world.harness.observer.steps[before:]
    assert max(step.num_distinct_adapters for step in steps) == len(KINDS), "they did not share a batch"


def test_every_request_alone_answers_as_in_the_batch(world: World) -> None:
    together = world.ask(*SETS)
    for name in SETS:
        for key, answer in world.ask(name).items():
            assert_same(answer, together[key], key)


def test_a_neighbour_with_outliers_changes_nothing(world: World) -> None:
    quiet = world.ask("base", "lora")
    beside = world.ask("base", "lora", beside=("loud",))
    for key, answer in quiet.items():
        assert_same(beside[key], answer, key)


def test_the_quantized_base_answers_otherwise_than_the_whole_one(world: World) -> None:
    definition = define(world.checkpoint, [])
    definition.model.generation_config.eos_token_id = None
    whole = greedy_answers(definition.model, PROMPTS, max_new_tokens=1)
    found = world.ask("base")
    assert any(abs(found["base", index][1][0] - whole[index][1][0]) > 1e-3 for index in range(len(PROMPTS)))


def test_an_outlier_in_a_row_leaves_the_other_rows_bit_for_bit(world: World) -> None:
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    loud = rows.clone()
    loud[3, 5] = 1e4
    with torch.inference_mode():
        for path, linear in quantized_linears(world.base.model):
            if linear.in_features == 64:
                others = [0, 1, 2, 4, 5, 6, 7]
                assert torch.equal(linear(rows)[others], linear(loud)[others]), path


def test_greedy_answers_on_nf4_equal_generate_of_the_same_quantized_model(tmp_path: Path) -> None:
    # Widths of whole blocks: at others the products of bitsandbytes itself are not to be relied on.
    checkpoint = build_checkpoint("qwen3", tmp_path, intermediate_size=128, head_dim=16)
    prompts = draw_prompts(1, 5, 17, 33, seed=1)
    model = quantized_model(checkpoint, "nf4")
    model.generation_config.eos_token_id = None
    expected = greedy_answers(model, prompts, max_new_tokens=10)
    base = load_base(checkpoint, dtype="float32", device=CPU, quantize="nf4")
    harness = make_harness(checkpoint, base=base, block_size=4, token_budget=24)
    answers = harness.run(
        harness.request(str(index), prompt, max_new_tokens=10, logprobs=0, stop_token_ids=())
        for index, prompt in enumerate(prompts)
    )
    for index, answer in enumerate(expected):
        found = answers[str(index)]
        assert_same((found.token_ids[0], [entry.logprob for entry in found.logprobs[0]]), answer, index)
