"""Requests of every kind, of none and of several at once share a batch, and each answers by its own definition."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from kind_definitions import Definition, define
from kind_sets import KINDS, SETS, make_kinds
from peft_adapters import generate, greedy_answers

NEW_TOKENS = 6
PROMPT_LENGTHS = (3, 19)
Answers = list[tuple[list[int], list[float]]]


def draw_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, 200) for _ in range(length)] for length in PROMPT_LENGTHS]


PROMPTS = draw_prompts(7)


class World:
    """One base with adapters of every kind, and what each set of them means."""

    def __init__(self, architecture: str, root: Path) -> None:
        self.checkpoint = build_checkpoint(architecture, root / "base")
        self.paths = make_kinds(self.checkpoint, root)
        self.harness: Harness = make_harness(self.checkpoint, self.paths, block_size=4, token_budget=40, max_running=32)
        self._defined: dict[str, tuple[Answers, Definition]] = {}

    def ask(self, *sets: str, num_prompts: int = len(PROMPTS)) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
        """Answer every prompt under each set, all in one wave, in an order that mixes them."""
        asked = [(name, index) for name in sets for index in range(num_prompts)]
        random.Random(3).shuffle(asked)
        requests = [
            self.harness.request(
                f"{name}/{index}", PROMPTS[index], *SETS[name], max_new_tokens=NEW_TOKENS, logprobs=0, stop_token_ids=()
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

    def defined(self, name: str) -> tuple[Answers, Definition]:
        """Return what the definition of a set answers, computed once."""
        if name not in self._defined:
            definition = define(self.checkpoint, [(self.paths[member], weight) for member, weight in SETS[name]])
            definition.model.generation_config.eos_token_id = None
            self._defined[name] = greedy_answers(definition.model, PROMPTS, max_new_tokens=NEW_TOKENS), definition
        return self._defined[name]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(found: tuple[list[int], list[float]], expected: tuple[list[int], list[float]], what: object) -> None:
    assert found[0] == expected[0], what
    assert found[1] == pytest.approx(expected[1], abs=1e-4), what


def test_every_kind_and_every_fusion_in_one_batch_answer_by_their_definitions(world: World) -> None:
    before = len(world.harness.observer.steps)
    together = world.ask(*SETS)
    for (name, index), found in together.items():
        assert_same(found, world.defined(name)[0][index], (name, index))
    steps = world.harness.observer.steps[before:]
    assert max(step.num_distinct_adapters for step in steps) == len(KINDS), "they did not share a batch"
    assert max(step.num_sequences for step in steps) > len(SETS)


@pytest.mark.parametrize("name", SETS)
def test_a_request_answers_alone_as_in_the_batch(world: World, name: str) -> None:
    alone = world.ask(name)
    for index, expected in enumerate(world.defined(name)[0]):
        assert_same(alone[name, index], expected, (name, index))


@pytest.mark.parametrize("name", ["lora", "loram"])
def test_low_rank_kinds_answer_as_peft_does_with_the_directory(world: World, name: str) -> None:
    found = world.ask(name)
    expected = generate(world.checkpoint, PROMPTS, world.paths[name], max_new_tokens=NEW_TOKENS)
    for index, (tokens, logprobs) in enumerate(expected):  # PEFT's generation stops at an eos
        answer = found[name, index]
        assert_same((answer[0][: len(tokens)], answer[1][: len(tokens)]), (tokens, logprobs), index)


@pytest.mark.parametrize("name", [name for name in SETS if SETS[name]])
def test_every_set_changes_an_answer(world: World, name: str) -> None:
    pairs = zip(world.defined(name)[0], world.defined("base")[0], strict=True)
    assert any(tokens != plain for (tokens, _), (plain, _) in pairs)


def test_every_member_of_a_fusion_moves_it(world: World) -> None:
    whole = world.defined("eight")[0]
    for left_out, _ in SETS["eight"]:
        rest = [(world.paths[name], weight) for name, weight in SETS["eight"] if name != left_out]
        without = greedy_answers(define(world.checkpoint, rest).model, PROMPTS[:1], max_new_tokens=1)[0]
        assert abs(without[1][0] - whole[0][1][0]) > 1e-3 or without[0] != whole[0][0][:1], left_out


def test_goat_routes_differ_between_tokens_and_between_linears(world: World) -> None:
    experts = world.defined("goat")[1].experts
    assert len(experts) >= 7
    assert all(len(set(one.routes)) > 1 for [one] in experts.values()), "a Linear routes every token alike"
    by_token = list(zip(*(one.routes for [one] in experts.values()), strict=True))
    assert all(len(set(routes)) > 1 for routes in by_token), "a token takes the same experts at every Linear"


def test_two_goat_adapters_share_one_residual_and_opposite_weights_drop_it(world: World) -> None:
    specs = [world.harness.adapters[name].spec for name in ("goat", "goat twin")]
    assert specs[0].shared == specs[1].shared
    assert len(specs[0].shared) == 1
    assert specs[0].digest != specs[1].digest
    found, expected = world.ask("goats against each other"), world.defined("goats against each other")[0]
    for index, answer in enumerate(expected):
        assert_same(found["goats against each other", index], answer, index)


def test_overlapping_and_disjoint_s2ft_adapters_are_exact_sums(world: World) -> None:
    heads, again = (world.harness.adapters[name].spec.channels for name in ("s2ft heads", "s2ft heads too"))
    shared = [path for path in heads if set(heads[path].indices) & set(again[path].indices)]
    assert any(path.endswith("o_proj") for path in shared)
    assert any(path.endswith("down_proj") for path in shared)
    found, expected = world.ask("overlapping heads"), world.defined("overlapping heads")[0]
    for index, answer in enumerate(expected):
        assert_same(found["overlapping heads", index], answer, index)
