"""NF4, INT8 and pruned bases on a GPU: adapters of every kind answer there as on the CPU, alone as in a batch.

What is compared between devices is quantized once, on the CPU, for a code at the edge of two may fall either way.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import Harness, make_harness
from held_bytes import held_bytes
from kind_sets import KINDS, SETS, make_kinds
from motley_bases.ledger import Weights, make_ledger
from motley_bases.loader import load_base, load_model, read_parsed_config
from motley_bases.quantization import NEEDED_PACKAGES, NONE, quantized_linears
from motley_trainer.bases.quantize import quantize_base
from peft_adapters import make_adapter
from pruned_bases import prune_checkpoint, random_keeps

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
METHODS = ("nf4", "int8")
# Of checkpoint and quantization.
CASES = (("whole", "nf4"), ("whole", "int8"), ("pruned", NONE), ("pruned", "nf4"))
NEW_TOKENS = 6
LOUD = "loud"
Answer = tuple[list[int], list[float]]


def needs_quantizer(quantization: str) -> None:
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if quantization != NONE and missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@dataclass(frozen=True)
class Checkpoints:
    """One random checkpoint, and a pruned copy of it."""

    whole: Path
    pruned: Path

    def stored(self, name: str, quantization: str) -> Path:
        """Return one of them as it is, or as a quantized checkpoint."""
        needs_quantizer(quantization)
        checkpoint: Path = getattr(self, name)
        written = checkpoint.with_name(f"{name}-{quantization}")
        if quantization == NONE:
            return checkpoint
        if not written.exists():
            quantize_base(checkpoint, quantization, written)
        return written


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("checkpoints")
    whole = build_checkpoint("llama", root / "whole")
    return Checkpoints(whole, prune_checkpoint(whole, root / "pruned", random_keeps(3, 2, 96)))


@dataclass(frozen=True)
class World:
    """One base on both devices, with adapters of every kind and one that is loud."""

    on_cpu: Harness
    on_gpu: Harness

    def ask(self, harness: Harness, *sets: str, beside: tuple[str, ...] = ()) -> dict[str, Answer]:
        """Answer each set in one wave, and other adapters' requests among them."""
        rng = random.Random(7)
        prompt = [rng.randrange(10, 200) for _ in range(19)]
        asked = [*sets, *beside]
        rng.shuffle(asked)
        answers = harness.run(
            harness.request(
                name,
                prompt,
                *SETS.get(name, ((name, 1.0),)),
                max_new_tokens=NEW_TOKENS,
                logprobs=0,
                stop_token_ids=(),
            )
            for name in asked
        )
        return {
            name: (answer.token_ids[0], [entry.logprob for entry in answer.logprobs[0]])
            for name, answer in answers.items()
        }


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def world(request: pytest.FixtureRequest, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> World:
    name, quantization = request.param
    checkpoint, root = checkpoints.stored(name, quantization), tmp_path_factory.mktemp("kinds")
    paths = make_kinds(getattr(checkpoints, name), root)
    paths[LOUD] = make_adapter(getattr(checkpoints, name), root / LOUD, seed=9, strength=60.0)
    harnesses = (
        make_harness(
            checkpoint,
            paths,
            base=load_base(checkpoint, dtype="float32", device=device),
            block_size=4,
            token_budget=40,
            max_running=32,
        )
        for device in (CPU, CUDA)
    )
    return World(*harnesses)


def assert_same(found: dict[str, Answer], expected: dict[str, Answer], tolerance: float) -> None:
    for name, (tokens, logprobs) in expected.items():
        assert found[name][0] == tokens, name
        assert found[name][1] == pytest.approx(logprobs, abs=tolerance), name


def test_every_kind_in_one_batch_answers_as_on_the_cpu(world: World) -> None:
    assert_same(world.ask(world.on_gpu, *SETS), world.ask(world.on_cpu, *SETS), 1e-3)
    steps = world.on_gpu.observer.steps
    assert max(step.num_distinct_adapters for step in steps) == len(KINDS), "they did not share a batch"


def test_every_request_alone_answers_as_in_the_batch(world: World) -> None:
    together = world.ask(world.on_gpu, *SETS)
    for name in SETS:
        assert_same(world.ask(world.on_gpu, name), {name: together[name]}, 1e-3)


def test_a_neighbour_with_outliers_changes_nothing(world: World) -> None:
    quiet = world.ask(world.on_gpu, "base", "lora")
    assert_same(world.ask(world.on_gpu, "base", "lora", beside=(LOUD,)), quiet, 1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_weight_that_is_meant_for_any_number_of_rows(
    checkpoints: Checkpoints, method: str, dtype: torch.dtype
) -> None:
    stored = checkpoints.stored("whole", method)
    model = load_model(stored, dtype, CUDA, method)
    on_cpu = load_model(stored, torch.float32, CPU, method)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for path, linear in quantized_linears(model):
        meant = on_cpu.get_submodule(path).expanded(torch.float32)
        torch.testing.assert_close(linear.expanded(torch.float32).cpu(), meant, rtol=1e-6, atol=0, msg=path)
        for num_rows in (1, 2, 5, 64, 2000):
            x = torch.randn(num_rows, linear.in_features, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
            expected = x.float() @ meant.T
            with torch.inference_mode():
                error = (linear(x.to(CUDA)).float().cpu() - expected).norm() / expected.norm()
            assert error < tolerance, (path, num_rows)


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_the_ledger_counts_what_is_held(checkpoints: Checkpoints, name: str, quantization: str) -> None:
    needs_quantizer(quantization)
    checkpoint = getattr(checkpoints, name)
    base = load_base(checkpoint, dtype="bfloat16", device=CUDA, quantize=quantization)
    ledger = make_ledger(read_parsed_config(checkpoint), Weights(torch.bfloat16, quantization, CUDA))
    assert ledger.weight_bytes == pytest.approx(held_bytes(base.model), rel=0.02)
