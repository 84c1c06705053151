"""The stages of a LoRAM job: gone on from wherever it died, one model at a time, in the bytes that the formulas say."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_bytes import held_bytes
from loram_jobs import collecting_quickly, loram_job, make_base, ran, stages_of
from motley_adapters.reader import inspect_adapter, read_adapter
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_base
from motley_bases.pruned_geometry import DecoderShape, PruneRule, num_parameters
from motley_bases.quantization import linear_bytes
from motley_bases.stored_spec import read_spec
from motley_trainer.errors import CheckpointError
from motley_trainer.job import adapter_job, loram_copy
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run
from motley_trainer.pruning.loram_checks import prune_settings
from motley_trainer.spec.settings import LoramPruning, LoramSettings
from motley_trainer.worker.workplace import JobDirectory
from transformers import PreTrainedModel

CPU = torch.device("cpu")
OTHER_CUT = LoramSettings(pruning=LoramPruning.RANDOM, layers=(1, 3))


class Crash(BaseException):
    """The process has stopped here."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with collecting_quickly():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


# --- Died, and begun again


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dying_at_each_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a job until it ends, where each run dies just before a name appears that no run has come to before.

    Semantics: so each run begins with what was written so far, and with what was being written lying aside.
    """
    real, seen = os.replace, dict[str, None]()

    def replace(old: Any, new: Any) -> None:
        name = str(Path(new).relative_to(folder))
        if name not in seen:
            seen[name] = None
            raise Crash(name)
        real(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        while not (folder / "result.json").exists():
            try:
                ran(folder)
            except Crash:
                continue
    return list(seen)


@pytest.mark.parametrize("pruning", ["STRUCTURED", "UNSTRUCTURED"])
def test_a_job_that_dies_at_every_stage_leaves_the_same_bytes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruning: str
) -> None:
    asked = {"pruning": f"LORAM_PRUNING_{pruning}", "align": {}}
    undisturbed = loram_job(tmp_path / "undisturbed", base, **asked)
    result, _ = ran(undisturbed)
    died = loram_job(tmp_path / "died", base, **asked)
    names = dying_at_each_rename(died, monkeypatch)
    assert [name for name in names if ".new-" not in name] == [
        "before.json", "stages/pruned", "stages/aligning/step-1", "stages/aligning/step-2", "stages/aligned",
        "checkpoints/step-1", "checkpoints/step-2", "evaluation.json", "adapter", "result.json",
    ]  # fmt: skip
    assert ran(died)[0] == result
    assert files(died) == files(undisturbed)


@pytest.mark.parametrize("place", ["pruning", "aligning", "training"])
def test_a_job_that_is_stopped_in_a_stage_does_no_stage_twice(base: Path, tmp_path: Path, place: str) -> None:
    folder = loram_job(tmp_path, base, align={})
    events: list[Any] = []

    def is_there() -> bool:
        return place in stages_of(events) and (place == "pruning" or "progress" in events[-1])

    with pytest.raises(JobCancelledError):
        run(folder, events.append, is_there)
    result, later = ran(folder)
    done = {"pruning": [], "aligning": ["pruning"], "training": ["pruning", "aligning"]}[place]
    assert not set(done) & set(stages_of(later))
    assert {"pruning", "aligning", "training"} - set(done) <= set(stages_of(later))
    assert ran(folder)[0] == result


def test_stages_of_another_spec_are_made_anew(base: Path, tmp_path: Path) -> None:
    folder = loram_job(tmp_path, base, pruning="LORAM_PRUNING_RANDOM")
    ran(folder)
    first = fingerprint(folder / "stages" / "pruned")
    for name in ("result.json", "evaluation.json"):
        (folder / name).unlink()
    loram_job(tmp_path, base, pruning="LORAM_PRUNING_RANDOM", seed="8")
    with pytest.raises(CheckpointError) as caught:
        ran(folder)
    assert caught.value.reason == "CHECKPOINT_OF_ANOTHER"
    assert fingerprint(folder / "stages" / "pruned") != first, "another seed draws another copy"


# --- Begun again under other terms


def under(folder: Path, **terms: str) -> None:
    """Tell a job what its worker tells it once it was started otherwise."""
    order = json.loads((folder / "job.json").read_text())
    JobDirectory(folder).write_order(order | terms)


def test_terms_that_a_copy_does_not_depend_on_leave_it_and_what_is_measured_is_measured_again(
    base: Path, tmp_path: Path
) -> None:
    folder = loram_job(tmp_path, base, align={})
    ran(folder)
    copy = fingerprint(folder / "stages" / "aligned")
    under(folder, served_quantization="nf4")
    result, events = ran(folder)
    told = stages_of(events)
    assert not {"pruning", "aligning"} & set(told)
    assert "measuring before" in told
    assert [stage for stage in told if stage.startswith("starting over")] == [
        "starting over: step-2 is of a training with another quantization: none, not nf4"
    ]
    assert fingerprint(folder / "stages" / "aligned") == copy
    anew, _ = ran(loram_job(tmp_path / "anew", base, align={}, served="nf4"))
    assert result == anew


@pytest.mark.parametrize("place", ["aligning", "training"])
def test_a_copy_of_other_terms_is_made_anew_and_what_was_trained_on_it_begins_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = loram_job(tmp_path / "moved", base, align={})
    events: list[Any] = []
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: place in stages_of(events) and "progress" in events[-1])
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    under(folder, base=str(elsewhere))
    real = loram_copy.make_copy
    # As where the same base gives another copy: on a GPU that sums otherwise.
    monkeypatch.setattr(loram_copy, "make_copy", lambda order: real(replace(order, settings=OTHER_CUT)))
    result, events = ran(folder)
    told = stages_of(events)
    assert {"pruning", "aligning", "measuring before"} <= set(told)
    over = ["starting over: the copy of the base was made anew"]
    assert [stage for stage in told if "over" in stage] == (over if place == "training" else [])
    steps = [event["progress"]["step"] for event in events if "progress" in event]
    assert steps == [1, 2, 1, 2], "of the alignment and of the training"
    anew, _ = ran(loram_job(tmp_path / "anew", elsewhere, align={}))
    assert result == anew


def test_a_job_can_be_stopped_while_it_reads_its_plain_text(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("motley_trainer.job.reporting.SECONDS_BETWEEN_STAGES", 0.0)
    folder, events = loram_job(tmp_path, base, align={}), list[Any]()
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: any("loram" in stage for stage in stages_of(events)))
    assert stages_of(events)[-1] == "reading data: line 1 of loram.alignment.dataset, 0%"


# --- In memory

RANK = 4
SHAPE = DecoderShape(4, 128, 192, 4, 2, 32, 0)  # without the vocabulary, whose weights are never pruned
RULE = PruneRule(LoramSettings().ratio, 1, 1)


def num_models() -> int:
    """Count the models with a head that are still there."""
    gc.collect()
    models = [thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)]
    return sum(model.get_output_embeddings() is not None for model in models)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[int, int]]:
    """Return what counts the bytes of the model that a job trains, and how many models there are then."""

    def count(folder: Path) -> tuple[int, int]:
        found: list[tuple[int, int]] = []
        real = adapter_job.train

        def watch(training: Any, *rest: Any) -> Any:
            found.append((held_bytes(training.model), num_models()))
            return real(training, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(adapter_job, "train", watch)
            ran(folder)
        return found[0]

    return count


def linears(kv_heads: int, ffn: int) -> list[tuple[int, int]]:
    """Return the Linears of a layer with so many heads and channels, as (inputs, outputs)."""
    d, keys = SHAPE.hidden_size, kv_heads * SHAPE.head_dim
    return [(d, 2 * keys), (d, keys), (d, keys), (2 * keys, d), (d, ffn), (d, ffn), (ffn, d)]


def wanted_bytes(*, is_pruned: bool, is_nf4: bool, vocab_size: int) -> int:
    """Count by the formula: weights, 2 bytes each or NF4's; factors, 4 bytes; nothing else but RoPE's frequencies."""
    small = linears(1, 96) if is_pruned else linears(2, 192)
    layers = linears(2, 192) * 2 + small * 2
    weights = num_parameters(SHAPE, RULE if is_pruned else None)
    factors = 4 * sum(RANK * (inputs + outputs) for inputs, outputs in layers)
    around = 2 * 2 * vocab_size * SHAPE.hidden_size
    in_linears = sum(inputs * outputs for inputs, outputs in layers)
    of_linears = sum(linear_bytes("nf4", *sides) for sides in layers) if is_nf4 else 2 * in_linears
    return around + 2 * (weights - in_linears) + of_linears + factors


def test_what_is_resident_in_training_falls_as_the_formulas_say(
    tmp_path: Path, held: Callable[[Path], tuple[int, int]]
) -> None:
    base = make_base(tmp_path / "base", hidden_size=128, intermediate_size=192, dtype=torch.bfloat16)
    vocab_size = read_spec(base).vocab_size
    found = {}
    for name, settings in (
        ("LoRA", {"ratio": "0"}),
        ("LoRAM", {}),
        ("QLoRAM", {"quantization": "nf4"}),
    ):
        folder = loram_job(tmp_path / name, base, dtype="auto", lora={"rank": RANK}, steps=1, **settings)
        found[name], num_models = held(folder)
        assert num_models == 1, "another base is resident beside the one that is trained on"
        wanted = wanted_bytes(is_pruned=name != "LoRA", is_nf4=name == "QLoRAM", vocab_size=vocab_size)
        assert found[name] == pytest.approx(wanted, rel=0.02), name
    assert found["LoRA"] > found["LoRAM"] > found["QLoRAM"]
    adapter = read_adapter(tmp_path / "QLoRAM" / "adapter", read_spec(base))
    original = load_base(base, dtype="auto", device=CPU)
    assert (original.spec.dtype, original.spec.fingerprint) == ("bfloat16", adapter.spec.serves_on)


def test_no_stage_begins_with_a_model_of_the_one_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, int] = {}

    def counted(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_call(*arguments: Any, **named: Any) -> Any:
            found[what] = num_models()
            return real(*arguments, **named)

        return count_and_call

    for what in ("make_copy", "load_job_base"):
        monkeypatch.setattr(loram_copy, what, counted(what, getattr(loram_copy, what)))
    ran(loram_job(tmp_path, base, align={}))
    assert found == {"make_copy": 0, "load_job_base": 0}


def test_a_job_for_a_base_that_is_served_in_nf4_measures_there(base: Path, tmp_path: Path) -> None:
    folder = loram_job(tmp_path, base, served="nf4", steps=1)
    result, _ = ran(folder)
    assert result.evaluation.loss_after != result.evaluation.loss_before
    assert inspect_adapter(folder / "adapter", read_spec(base)).spec.digest == result.digest


def test_half_of_the_heads_and_channels_is_the_settings_own_half() -> None:
    assert prune_settings(LoramSettings(layers=(1, 3))).layers(4) == RULE.pruned_layers(4)
