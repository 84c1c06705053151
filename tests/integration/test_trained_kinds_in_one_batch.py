"""Adapters of every kind, each made by a job, in one batch: the logits of the model that its job measured."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapters import logits
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from job_folders import make_job
from loram_jobs import SAMPLES, collecting_quickly
from motley_bases.loader import load_base
from motley_kernels.testing import TOLERANCES
from motley_server.engine.model_runner import ModelRunner
from motley_server.engine.scheduler import Scheduled
from motley_trainer.job import workbench
from motley_trainer.job.run import run
from torch import Tensor

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 3},
    "s2ft": {"o_share": 0.5, "down_share": 0.2, "v_share": 0.5, "up_share": 0.1},
    "goat": {"rank": 8, "experts": 4},
    "loram": {"layers": "1:3", "lora": {"rank": 3}},
}
SPEC: Mapping[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "seed": "7",
    "max_length": 16,
    "optimizer": {"learning_rate": 1e-2},
    "gate": {"max_loss_ratio": 100.0},
}
BASE = "base"
ROWS = (BASE, *SETTINGS)

Logits = dict[str, Tensor]


def draw_prompts() -> dict[str, list[int]]:
    rng = random.Random(7)
    return {row: [rng.randrange(10, 200) for _ in range(7 + 3 * place)] for place, row in enumerate(ROWS)}


PROMPTS = draw_prompts()  # one a row, of different lengths


class World:
    """A base as it is served, an adapter of each kind that a job has made for it, and what the jobs had at their end.

    Semantics: `evaluated[kind][row]` are the logits of a row's prompt, of the model that the job of that kind measured.
    """

    def __init__(self, root: Path, dtype: str, quantization: str) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        sizes = {"num_hidden_layers": 4, "intermediate_size": 128}  # of whole blocks, for NF4's products
        checkpoint = build_checkpoint("llama", root / BASE, dtype=self.dtype, **sizes)
        self.evaluated: dict[str, Logits] = {}
        for kind, settings in SETTINGS.items():
            folder = root / kind
            folder.mkdir()
            asked = {kind: settings, **SPEC}
            make_job(folder, SAMPLES, method=kind.upper(), base=checkpoint, served=quantization, dtype=dtype, **asked)
            self.evaluated[BASE], self.evaluated[kind] = measured_by(folder)
        base = load_base(checkpoint, dtype=dtype, device=torch.device("cpu"), quantize=quantization)
        adapters = {kind: root / kind / "adapter" for kind in SETTINGS}
        self.harness: Harness = make_harness(checkpoint, adapters, base=base, token_budget=256)
        self.serve(ROWS)  # which brings the adapters to where batches find them

    def serve(self, rows: Sequence[str]) -> list[Logits]:
        """Ask for every row at once, in this order, and return each pass's logits, in the order that it had them."""
        passes: list[Logits] = []
        real = ModelRunner.run

        def watch(runner: ModelRunner, scheduled: Sequence[Scheduled]) -> list[Tensor]:
            found = real(runner, scheduled)
            names = (entry.sequence.request.request_id for entry in scheduled)
            passes.append({name: of_row.clone() for name, of_row in zip(names, found, strict=True)})
            return found

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ModelRunner, "run", watch)
            self.harness.run(
                self.harness.request(row, PROMPTS[row], *([] if row == BASE else [row]), prompt_logprobs=True)
                for row in rows
            )
        return passes


def measured_by(folder: Path) -> list[Logits]:
    """Run a job, and return the logits of both models that it measures: of the base, and of what it has trained."""
    found: list[Logits] = []
    real = workbench.measure

    def watch(model: Any, *rest: Any, **named: Any) -> Any:
        found.append({row: logits(model, prompt).float() for row, prompt in PROMPTS.items()})
        return real(model, *rest, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workbench, "measure", watch)
        run(folder, lambda event: None)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """Return how far logits are from others at most, of all tokens that both have, over their length."""
    expected = expected[: len(found)]
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


HELD = [("float32", "none"), ("bfloat16", "none"), ("float32", "nf4"), ("bfloat16", "nf4")]


@pytest.fixture(scope="module", params=HELD, ids=" ".join)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with collecting_quickly():
        yield World(tmp_path_factory.mktemp("world"), *request.param)


def test_in_one_batch_each_row_has_the_logits_that_its_job_measured_by(world: World) -> None:
    (together,) = world.serve(ROWS)
    assert list(together) == list(ROWS)
    for row, found in together.items():
        assert len(found) == len(PROMPTS[row]) - 1
        assert distance(found, world.evaluated[row][row]) < TOLERANCES[world.dtype][0], row


def test_whose_neighbour_a_row_is_changes_no_bit_of_it(world: World) -> None:
    (together,) = world.serve(ROWS)
    for order in (ROWS[::-1], (*ROWS[2:], *ROWS[:2])):
        (permuted,) = world.serve(order)
        assert list(permuted) == list(order)
        assert all(torch.equal(permuted[row], together[row]) for row in ROWS)


def test_no_two_rows_could_be_taken_for_each_other(world: World) -> None:
    for one, other in combinations(ROWS, 2):
        for row in (one, other):
            assert distance(world.evaluated[one][row], world.evaluated[other][row]) > 0.1, (one, other)
