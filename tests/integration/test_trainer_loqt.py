"""Jobs by LoQT from their folder to a base that serves: from a base and from scratch, stopped, killed, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_checkpoint
from engine_harness import make_harness
from job_folders import make_job, reversals
from loram_jobs import collecting_quickly, stages_of
from motley_adapters.errors import AdapterError
from motley_adapters.reader import read_adapter
from motley_bases.checkpoint import read_config
from motley_bases.errors import BaseError
from motley_bases.loader import load_base
from motley_trainer.bases.quantize import quantize_base
from motley_trainer.data.training_data import read_data
from motley_trainer.errors import CheckpointError, TrainerError
from motley_trainer.files.loqt_manifest import MANIFEST_FILE, read_loqt_manifest
from motley_trainer.job import made_base
from motley_trainer.job.base import load_job_base
from motley_trainer.job.evaluation import mean_loss
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.made_base import chain_of
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run
from pruned_bases import prune_checkpoint, random_keeps
from safetensors.torch import load_file

CPU = torch.device("cpu")
SAMPLES = reversals(40)
SPEC: dict[str, Any] = {
    "steps": 12,
    "batch_size": 4,
    "checkpoint_steps": 5,
    "seed": "7",
    "max_length": 24,
    "optimizer": {"learning_rate": 1e-2},
    "publish": None,
}
LOQT = {"rank": 8, "merge_interval": 2, "schedule": "LOQT_SCHEDULE_STATIC"}
NOTHING: Mapping[str, Any] = {}
Events = list[Mapping[str, Any]]


def job(folder: Path, base: Path, *, loqt: Mapping[str, Any] = NOTHING, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return make_job(folder, SAMPLES, method="LOQT", base=base, loqt={**LOQT, **loqt}, **{**SPEC, **more})


def ran(folder: Path) -> tuple[Result, Events]:
    events: Events = []
    return run(folder, events.append), events


def kinds(events: Events) -> list[str]:
    return [value if kind == "stage" else kind for event in events for kind, value in event.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Any:
    with collecting_quickly():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Result, Events]:
    folder = job(tmp_path_factory.mktemp("undisturbed"), base)
    return folder, *ran(folder)


# --- From a base


def test_a_job_tells_its_merges_and_leaves_a_base_and_a_result(undisturbed: tuple[Path, Result, Events]) -> None:
    folder, result, events = undisturbed
    assert [kind for kind in kinds(events) if kind not in ("progress", "merges")] == [
        "reading data", "data", "loading base", "measuring before", "training", "checkpoint_step", "checkpoint_step",
        "checkpoint_step", "loading base", "measuring after", "evaluation", "writing",
    ]  # fmt: skip
    merges = [merge for event in events if "merges" in event for merge in event["merges"]["merges"]]
    assert [merge["step"] for merge in merges] == [2, 4, 6, 8, 10]
    assert len({merge["digest"] for merge in merges}) == 5
    assert result.passed
    assert result.evaluation.loss_after < 0.8 * result.evaluation.loss_before
    stored = json.loads((folder / "result.json").read_text())
    assert stored["digest"] == stored["base"]["fingerprint"] == result.digest
    assert stored["base"]["directory"] == str((folder / "base").absolute())
    assert stored["base"]["num_merges"] == 5
    assert stored["base"]["size_bytes"] == sum(len(content) for content in files(folder / "base").values())
    assert sorted(path.name for path in folder.iterdir()) == [
        "base", "before.json", "checkpoints", "data", "evaluation.json", "job.json", "result.json",
    ]  # fmt: skip


def test_the_base_says_how_it_came_to_be(undisturbed: tuple[Path, Result, Events], base: Path) -> None:
    folder, result, events = undisturbed
    manifest = json.loads((folder / "base" / MANIFEST_FILE).read_text())
    original = load_base(base, dtype="auto", device=CPU).spec
    assert (manifest["schema_version"], manifest["fingerprint"]) == (1, result.digest)
    assert manifest["original_fingerprint"] == original.fingerprint
    assert manifest["merges"] == [merge for event in events if "merges" in event for merge in event["merges"]["merges"]]
    request = JobFiles(folder).request()
    assert (manifest["spec"], manifest["datasets"]) == (request.spec.digest, [request.spec.dataset])
    assert (manifest["steps"], manifest["seed"], manifest["rank"]) == (12, 7, 8)
    assert manifest["trained_quantization"] == "nf4"
    assert manifest["settings"]["schedule"] == "static"
    assert manifest["evaluation"]["loss_after"] == result.evaluation.loss_after
    assert manifest["versions"].keys() == {"motley", "torch", "transformers"}


def test_the_base_serves_at_once_and_gives_the_loss_that_was_measured(
    undisturbed: tuple[Path, Result, Events], base: Path
) -> None:
    folder, result, _ = undisturbed
    served = load_base(folder / "base", dtype="float32", device=CPU)
    assert served.spec.fingerprint == result.digest
    harness = make_harness(folder / "base", {}, base=served)
    answer = harness.run([harness.request("one", [3, 4, 5], max_new_tokens=3)])["one"]
    assert len(answer.token_ids[0]) <= 3
    assert answer.error is None
    spec = JobFiles(folder).request().spec
    plain = load_job_base(folder / "base", name="new", dtype="float32", device=CPU, quantization="none")
    data = read_data(folder / "data", spec, plain.tokenizer, plain.spec.context_length)
    assert result.evaluation.loss_after == pytest.approx(mean_loss(plain.model, data.held_out), rel=1e-6)
    # Every weight is another, in the dtype of the original; all beside the weights is the original's own.
    before, after = (load_file(path / "model.safetensors") for path in (base, folder / "base"))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert read_config(folder / "base") == read_config(base)
    assert (folder / "base" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_an_adapter_of_the_old_base_is_refused_by_the_new_one(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], base: Path
) -> None:
    folder = make_job(tmp_path, SAMPLES, base=base, steps=1, batch_size=4, max_length=24, lora={"rank": 2})
    run(folder, lambda event: None)
    old, new = (load_base(path, dtype="float32", device=CPU).spec for path in (base, undisturbed[0] / "base"))
    assert read_adapter(folder / "adapter", old).spec.trained_on == old.fingerprint
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder / "adapter", new)
    assert refused.value.reason == "BASE_MISMATCH"


@pytest.mark.parametrize("places", [["measuring before", "merges", "checkpoint_step"], ["measuring after"]], ids=str)
def test_a_job_that_is_stopped_and_begun_again_gives_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], base: Path, places: list[str]
) -> None:
    folder = job(tmp_path, base)
    for place in places:
        events: Events = []
        with pytest.raises(JobCancelledError):
            run(folder, events.append, lambda place=place, events=events: place in kinds(events))  # type: ignore[misc]
        assert not (folder / "base").exists()
    result, _ = ran(folder)
    assert result.evaluation == undisturbed[1].evaluation
    one, other = files(undisturbed[0] / "base"), files(folder / "base")
    assert one == other


def test_a_job_that_died_while_it_moved_the_base_makes_it_again_from_the_last_checkpoint(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path, base)
    real, moved = made_base.os.replace, []

    def replace(source: Any, target: Any) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.extend([source] if "/stages/trained/" in str(source) else [])
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(made_base.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            run(folder, lambda event: None)
    assert not (folder / "base").exists()
    result, events = ran(folder)
    assert "progress" not in kinds(events)
    assert files(folder / "base") == files(undisturbed[0] / "base")
    assert result.evaluation == undisturbed[1].evaluation


@pytest.mark.parametrize("missing", [[], ["result.json"], ["result.json", "evaluation.json"]], ids=str)
def test_a_job_goes_on_after_what_is_done(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], missing: list[str]
) -> None:
    folder = tmp_path / "job"
    shutil.copytree(undisturbed[0], folder)
    for name in missing:
        (folder / name).unlink()
    result, events = ran(folder)
    assert "progress" not in kinds(events)
    assert (result.digest, result.evaluation) == (undisturbed[1].digest, undisturbed[1].evaluation)
    assert files(folder / "base") == files(undisturbed[0] / "base")


def test_resuming_with_another_schedule_is_refused(tmp_path: Path, base: Path) -> None:
    folder = job(tmp_path, base)
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: "checkpoint_step" in kinds(events))
    job(tmp_path, base, loqt={"schedule": "LOQT_SCHEDULE_EXPONENTIAL"})
    with pytest.raises(CheckpointError) as refused:
        run(folder, lambda event: None)
    assert (refused.value.reason, refused.value.field) == ("CHECKPOINT_OF_ANOTHER", "loqt.schedule")
    job(tmp_path, base, optimizer={"learning_rate": 2e-2})
    with pytest.raises(CheckpointError) as refused:
        run(folder, lambda event: None)
    assert refused.value.field == "spec"


def test_other_terms_begin_it_anew(tmp_path: Path, base: Path) -> None:
    folder = job(tmp_path, base, steps=3, checkpoint_steps=1)
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: "checkpoint_step" in kinds(events))
    job(tmp_path, base, steps=3, checkpoint_steps=1, dtype="bfloat16")
    result, events = ran(folder)
    assert any(stage.startswith("starting over") for stage in stages_of(list(events)))
    assert result.base is not None


def test_a_base_that_loqt_made_is_trained_on_and_tells_all_that_it_came_from(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], base: Path
) -> None:
    first = undisturbed[0] / "base"
    short = {"steps": 3, "gate": {"max_loss_ratio": 100.0}}
    second, _ = ran(job(tmp_path / "second", first, **short))
    third, _ = ran(job(tmp_path / "third", tmp_path / "second" / "base", **short))
    assert second.base is not None
    original = load_base(base, dtype="auto", device=CPU).spec.fingerprint
    assert second.base.original_fingerprint == undisturbed[1].digest
    chains = [read_loqt_manifest(tmp_path / name / "base") for name in ("second", "third")]
    assert [chain and chain.chain for chain in chains] == [
        (original, undisturbed[1].digest),
        (original, undisturbed[1].digest, second.digest),
    ]
    assert load_base(tmp_path / "third" / "base", dtype="float32", device=CPU).spec.fingerprint == third.digest
    # The manifest of other weights tells nothing of these.
    moved = shutil.copytree(base, tmp_path / "moved")
    shutil.copy(first / MANIFEST_FILE, moved)
    assert chain_of(moved, original) == (original,)


# --- From scratch, and held as it is


def test_from_scratch_weights_are_the_seeds_and_not_the_bases(tmp_path: Path, base: Path) -> None:
    scratch = {"start": "LOQT_START_SCRATCH"}
    found = {}
    for name, seed, start in (("a", "1", base), ("b", "1", base), ("c", "2", base)):
        folder = job(tmp_path / name, start, loqt=scratch, seed=seed, quantization="none", steps=3)
        state = torch.get_rng_state()
        found[name], events = ran(folder)
        assert torch.equal(torch.get_rng_state(), state)
        assert stages_of(list(events))[:2] == ["reading data", "drawing weights"]
    assert found["a"].digest == found["b"].digest != found["c"].digest
    result = found["a"]
    assert result.base is not None
    assert result.base.original_fingerprint is None
    assert 3 < result.evaluation.loss_before < 6  # of a vocabulary of 150 or so, evenly: nothing of the base is left
    assert result.evaluation.loss_after < result.evaluation.loss_before
    made = tmp_path / "a" / "base"
    assert load_base(made, dtype="float32", device=CPU).spec.fingerprint == result.digest
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.bfloat16}


def test_a_served_quantization_is_what_is_measured_and_not_what_is_trained(tmp_path: Path, base: Path) -> None:
    folder = job(tmp_path, base, served="nf4", quantization="none", steps=3)
    result, _ = ran(folder)
    spec = JobFiles(folder).request().spec
    held = load_job_base(folder / "base", name="new", dtype="float32", device=CPU, quantization="nf4")
    data = read_data(folder / "data", spec, held.tokenizer, held.spec.context_length)
    assert result.evaluation.loss_after == pytest.approx(mean_loss(held.model, data.held_out), rel=1e-5)
    checkpoint = load_file(folder / "checkpoints" / "step-3" / "tensors.safetensors")
    assert any(name.endswith("q_proj.weight.values") for name in checkpoint)


def test_a_gate_that_is_not_passed_leaves_the_base_and_says_so(tmp_path: Path, base: Path) -> None:
    result, _ = ran(job(tmp_path, base, gate={"max_loss_ratio": 1e-3}, steps=3))
    assert (result.passed, result.reason) == (False, "GATE_NOT_PASSED")
    assert (tmp_path / "base").is_dir()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "gemma2"])
def test_other_families_and_tied_embeddings(tmp_path: Path, name: str) -> None:
    base = build_checkpoint(name, tmp_path / "base")
    result, _ = ran(job(tmp_path / "job", base, steps=3, loqt={"rank": 4}, gate={"max_loss_ratio": 100.0}))
    served = load_base(tmp_path / "job" / "base", dtype="float32", device=CPU)
    assert served.spec.fingerprint == result.digest
    names = [load_file(path / "model.safetensors").keys() for path in (base, tmp_path / "job" / "base")]
    assert names[0] == names[1]


def test_a_pruned_base_stays_pruned_and_bound_to_its_original(tmp_path: Path) -> None:
    original = build_checkpoint("llama", tmp_path / "original")
    pruned = prune_checkpoint(original, tmp_path / "pruned", random_keeps(3, 2, 96))
    result, _ = ran(job(tmp_path / "job", pruned, steps=3, loqt={"rank": 4}, gate={"max_loss_ratio": 100.0}))
    before, after = (load_base(path, dtype="float32", device=CPU).spec for path in (pruned, tmp_path / "job" / "base"))
    assert after.fingerprint == result.digest != before.fingerprint
    assert (after.pruned_from, after.linears) == (before.pruned_from, before.linears)


# --- Refused


def test_what_cannot_be_trained_is_refused_by_its_field(tmp_path: Path, base: Path) -> None:
    stored = tmp_path / "stored"
    quantize_base(base, "nf4", stored)
    pruned = prune_checkpoint(base, tmp_path / "pruned", random_keeps(3, 2, 96))
    odd = shutil.copytree(base, tmp_path / "odd")
    (odd / MANIFEST_FILE).write_text("[]")
    cases: list[tuple[Path, dict[str, Any], str, str]] = [
        (base, {"loqt": {"rank": 33}}, "RANK_TOO_LARGE", "loqt.rank"),
        (stored, {"served": "nf4"}, "QUANTIZED_OTHERWISE", "quantization"),
        (stored, {"served": "nf4", "quantization": "none"}, "QUANTIZED_OTHERWISE", "quantization"),
        (pruned, {"loqt": {"start": "LOQT_START_SCRATCH"}}, "ALREADY_PRUNED", "loqt.start"),
        (base, {"loqt": {"merge_interval": 1}}, "BAD_SPEC", "loqt.merge_interval"),
        (base, {"loqt": {"merge_interval": 12}}, "BAD_SPEC", "loqt.merge_interval"),
        (odd, {}, "LOQT_MANIFEST", "loqt_manifest"),
        (base, {"publish": {"adapter_name": "a"}}, "BAD_SPEC", "publish"),
    ]
    for number, (of, more, reason, field) in enumerate(cases):
        folder = job(tmp_path / str(number), of, **more)
        events: Events = []
        with pytest.raises((TrainerError, BaseError)) as refused:
            run(folder, events.append)
        assert (refused.value.reason, refused.value.field) == (reason, field)
        if reason != "RANK_TOO_LARGE":  # which the weights tell
            assert "loading base" not in kinds(events)
        assert not (folder / "base").exists()
        assert not (folder / "checkpoints").exists()


# --- Killed

KILLED = """
import os, signal, sys
from pathlib import Path
from motley_trainer.job.process import _settle_torch
from motley_trainer.job.run import run
from motley_trainer.methods.loqt_linear import LoqtLinear

def at(calls, real):
    def wrapped(*arguments):
        calls[0] -= 1
        if calls[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return wrapped

_settle_torch()
where, count = sys.argv[2], [int(sys.argv[3])]
if where == "inside":
    LoqtLinear.renew = at(count, LoqtLinear.renew)
else:
    from motley_trainer.job import loop
    loop._take_step = at(count, loop._take_step)
run(Path(sys.argv[1]), lambda event: None)
"""


def test_a_job_that_is_killed_between_and_inside_merges_gives_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], base: Path
) -> None:
    """21 Linears: killed in the middle of the third time that they begin anew, then before the tenth step, then not."""
    folder = job(tmp_path, base)
    for where, count in (("inside", 2 * 21 + 9), ("between", 10)):
        command = [sys.executable, "-c", KILLED, str(folder), where, str(count)]
        killed = subprocess.run(command, capture_output=True, text=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    result, _ = ran(folder)
    assert result.evaluation == undisturbed[1].evaluation
    assert files(folder / "base") == files(undisturbed[0] / "base")
