"""A job from its folder to its result, on the embedded base: undisturbed, stopped at any place, and begun again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapters import applied
from engine_harness import make_harness
from job_folders import TINY, make_job, reversals, write_dataset
from motley_adapters.reader import read_adapter
from motley_bases.base import Base
from motley_bases.loader import load_base
from motley_bases.refusing import refusing
from motley_trainer.data.training_data import read_data
from motley_trainer.errors import CheckpointError, DataError, OutputError, SettingsError, TrainerError
from motley_trainer.job.base import load_job_base
from motley_trainer.job.evaluation import mean_loss
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.process import exit_as_told
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run
from safetensors.torch import load_file

CPU = torch.device("cpu")
SAMPLES = reversals(40)
SPEC: dict[str, Any] = {
    "steps": 8,
    "batch_size": 4,
    "micro_batch_size": 3,
    "checkpoint_steps": 3,
    "seed": "7",
    "lora": {"rank": 4, "dropout": 0.1},
    "optimizer": {"learning_rate": 4e-3},
}
Events = list[Mapping[str, Any]]


def job(folder: Path, **more: Any) -> Path:
    return make_job(folder, SAMPLES, **{**SPEC, **more})


def ran(folder: Path) -> tuple[Result, Events]:
    events: Events = []
    return run(folder, events.append), events


def stopped(folder: Path, after: str) -> Events:
    """Run a job, and stop it at the first look after something was told."""
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(folder, events.append, lambda: after in kinds(events))
    return events


def kinds(events: Events) -> list[str]:
    return [value if kind == "stage" else kind for event in events for kind, value in event.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Events]:
    folder = job(tmp_path_factory.mktemp("undisturbed"))
    return folder, *ran(folder)


@pytest.fixture(scope="module")
def served() -> Base:
    return load_base(TINY, dtype="float32", device=CPU)


# --- Undisturbed


def test_a_job_tells_what_it_does_and_leaves_an_adapter_and_a_result(undisturbed: tuple[Path, Result, Events]) -> None:
    folder, result, events = undisturbed
    told = [kind for kind in kinds(events) if kind != "progress"]
    assert told == [
        "reading data", "data", "loading base", "measuring before", "training", "checkpoint_step", "checkpoint_step",
        "checkpoint_step", "measuring after", "evaluation", "writing",
    ]  # fmt: skip
    assert [event["checkpoint_step"] for event in events if "checkpoint_step" in event] == [3, 6, 8]
    (data,) = (event["data"] for event in events if "data" in event)
    assert {name: data[name] for name in data if name != "num_tokens"} == {
        "num_samples": 36, "num_held_out": 4, "num_truncated": 0, "num_dropped": 0,
    }  # fmt: skip
    assert result.passed
    assert result.evaluation.loss_after < result.evaluation.loss_before
    assert result.evaluation.exact_match_before is not None
    stored = json.loads((folder / "result.json").read_text())
    assert stored["evaluation"] == next(event["evaluation"] for event in events if "evaluation" in event)
    assert (stored["digest"], stored["passed"]) == (result.digest, True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "before.json", "checkpoints", "data", "evaluation.json", "job.json", "result.json",
    ]  # fmt: skip


def test_the_adapter_is_bound_to_its_base_and_says_how_it_came_to_be(
    undisturbed: tuple[Path, Result, Events], served: Base
) -> None:
    folder, result, _ = undisturbed
    adapter = read_adapter(folder / "adapter", served.spec)
    assert adapter.spec.digest == result.digest
    assert adapter.spec.trained_on == served.spec.fingerprint
    provenance = json.loads((folder / "adapter" / "motley_manifest.json").read_text())["provenance"]
    request = JobFiles(folder).request()
    assert provenance["datasets"] == [request.spec.dataset]
    assert (provenance["method"], provenance["steps"], provenance["seed"]) == ("lora", 8, 7)
    assert (provenance["spec"], provenance["job"]) == (request.spec.digest, request.job_id)
    assert provenance["trained_quantization"] == provenance["served_quantization"] == "none"
    assert provenance["settings"]["dropout"] == 0.1


def test_what_is_measured_after_is_what_the_server_says(undisturbed: tuple[Path, Result, Events], served: Base) -> None:
    """The engine scores each held-out sample under the adapter, and greedily answers its prompt."""
    folder, result, _ = undisturbed
    spec = JobFiles(folder).request().spec
    data = read_data(folder / "data", spec, served.tokenizer, served.spec.context_length)
    harness = make_harness(TINY, {"learned": folder / "adapter"}, base=served)
    requests = [
        harness.request(str(sample.line), sample.tokens, "learned", prompt_logprobs=True, max_new_tokens=1)
        for sample in data.held_out
    ]
    answers = harness.run(requests)
    total = 0.0
    for sample in data.held_out:
        of_sample = answers[str(sample.line)].prompt_logprobs
        first = len(sample.tokens) - len(of_sample)  # the first token has nothing to be predicted from
        for start, end in sample.learned:
            total -= sum(of_sample[place - first].logprob for place in range(start, end))
    num_learned = sum(sample.num_learned for sample in data.held_out)
    assert total / num_learned == pytest.approx(result.evaluation.loss_after, rel=1e-5)


# --- Stopped, died, begun again


@pytest.mark.parametrize("places", [["measuring before", "progress", "checkpoint_step"], ["measuring after"]], ids=str)
def test_a_job_that_is_stopped_and_begun_again_gives_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], places: list[str]
) -> None:
    job(tmp_path)
    for place in places:
        stopped(tmp_path, place)
        assert not (tmp_path / "result.json").exists()
    result, _ = ran(tmp_path)
    assert result == undisturbed[1]
    assert files(tmp_path / "adapter") == files(undisturbed[0] / "adapter")


@pytest.mark.parametrize(
    ("missing", "stages"),
    [
        ([], []),
        (["result.json"], []),
        (["result.json", "adapter"], ["reading data", "loading base", "training", "measuring after", "writing"]),
    ],
)
def test_a_job_goes_on_after_what_is_done(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], missing: list[str], stages: list[str]
) -> None:
    folder = tmp_path / "job"
    shutil.copytree(undisturbed[0], folder)
    for name in missing:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / ".new-adapter").mkdir()  # what a process that died while it wrote has left
    result, events = ran(folder)
    assert result == undisturbed[1]
    assert [event["stage"] for event in events if "stage" in event] == stages
    assert "progress" not in kinds(events)
    assert files(folder) == files(undisturbed[0])


def test_a_process_that_is_told_to_stop_keeps_a_checkpoint_that_another_goes_on_from(tmp_path: Path) -> None:
    folder = job(tmp_path, steps=1000)
    child = subprocess.Popen(
        [sys.executable, "-m", "motley_trainer.job", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    events: Events = []
    assert child.stdout is not None
    for line in child.stdout:
        events.append(json.loads(line))
        if "progress" in events[-1]:
            child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 3, errors
    assert events[-1] == {"cancelled": True}
    kept = next(event["checkpoint_step"] for event in reversed(events) if "checkpoint_step" in event)
    assert 0 < kept < 1000
    later = stopped(folder, "progress")
    assert [event["progress"]["step"] for event in later if "progress" in event] == [kept + 1]


# --- As a process, without one


@pytest.fixture
def as_process(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, Events, str]]]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()

    def run_as_process(job: Callable[..., Any]) -> tuple[int, Events, str]:
        status = exit_as_told(job, ["folder"])
        captured = capfd.readouterr()
        return status, [json.loads(line) for line in captured.out.splitlines()], captured.err

    yield run_as_process
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(threads)


def test_a_process_says_events_alone_and_how_it_ended(as_process: Callable[..., tuple[int, Events, str]]) -> None:
    def good(folder: Path, emit: Callable[..., None], should_stop: Callable[[], bool]) -> None:
        os.write(1, b"a library that chatters\n")
        emit({"stage": "here"})
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()

    status, events, errors = as_process(good)
    assert (status, events) == (0, [{"stage": "here"}])
    assert "chatters" in errors


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (
            TrainerError("no", reason="BAD_SPEC", field="seed"), 1,
            {"failed": {"reason": "BAD_SPEC", "message": "no", "field": "seed"}},
        ),
        (JobCancelledError(), 3, {"cancelled": True}),
        (RuntimeError("a bug"), 70, None),
    ],
)  # fmt: skip
def test_a_process_that_fails_says_why(
    as_process: Callable[..., tuple[int, Events, str]], error: Exception, status: int, last: dict[str, Any] | None
) -> None:
    def bad(*arguments: object) -> None:
        raise error

    found, events, errors = as_process(bad)
    assert (found, events) == (status, [] if last is None else [last])
    assert ("a bug" in errors) == (last is None)


OUT_OF_MEMORY = [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1")]


@pytest.mark.parametrize(("stage", "field"), [("aligning", "micro_batch_size"), ("loading base", "")])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_process_without_the_memory_says_so(
    as_process: Callable[..., tuple[int, Events, str]], error: Exception, stage: str, field: str
) -> None:
    def bad(folder: Path, emit: Callable[..., None], *arguments: object) -> None:
        emit({"stage": stage})
        with refusing("/models/base cannot be built", "MODEL_CONSTRUCTION") if not field else nullcontext():
            raise error

    status, (_, last), _ = as_process(bad)
    failed = last["failed"]
    assert (status, failed["reason"], failed["field"]) == (1, "OUT_OF_MEMORY", field)
    assert f"at the stage '{stage}'" in failed["message"]
    assert ("/models" in failed["message"], "micro-batches" in failed["message"]) == (False, bool(field))


# --- Bases held otherwise


def test_a_training_on_another_quantization_is_measured_on_the_base_as_it_is_served(
    tmp_path: Path, served: Base
) -> None:
    folder = job(tmp_path, quantization="nf4", steps=2)
    with pytest.raises(JobCancelledError):
        run(folder, lambda event: None, (folder / "before.json").exists)  # between the bases
    result, events = ran(folder)
    spec = JobFiles(folder).request().spec
    plain = load_job_base(TINY, name="tiny", dtype="float32", device=CPU, quantization="none")
    data = read_data(folder / "data", spec, plain.tokenizer, plain.spec.context_length)
    adapter = read_adapter(folder / "adapter", served.spec)
    assert result.evaluation.loss_before == pytest.approx(mean_loss(plain.model, data.held_out), rel=1e-6)
    with applied(plain.model, (adapter, 1.0)):
        assert result.evaluation.loss_after == pytest.approx(mean_loss(plain.model, data.held_out), rel=1e-5)
    quantized = load_job_base(TINY, name="tiny", dtype="float32", device=CPU, quantization="nf4")
    with applied(quantized.model, (adapter, 1.0)):
        assert result.evaluation.loss_after != pytest.approx(mean_loss(quantized.model, data.held_out), rel=1e-4)
    provenance = json.loads((folder / "adapter" / "motley_manifest.json").read_text())["provenance"]
    assert (provenance["trained_quantization"], provenance["served_quantization"]) == ("nf4", "none")
    assert kinds(events).count("loading base") == 2
    assert result.evaluation.loss_after < result.evaluation.loss_before
    trained = load_file(folder / "checkpoints" / "step-2" / "tensors.safetensors")
    assert all(torch.equal(unit.a, trained[f"parameter.{path}.lora_a"]) for path, unit in adapter.units.items())


def test_a_base_is_described_as_a_server_does_and_attends_by_transformers(served: Base) -> None:
    found = load_job_base(TINY, name="tiny", dtype="float32", device=CPU, quantization="none")
    assert found.spec == replace(served.spec, name="tiny")
    assert found.model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


# --- Refused


@pytest.mark.parametrize(
    ("spec", "error", "field"),
    [
        ({"lora": {"target_modules": ["c_attn"]}}, SettingsError, "lora.target_modules"),
        ({"max_length": 513}, SettingsError, "max_length"),
        ({"steps": None, "epochs": 0.1, "optimizer": {"warmup_steps": 5}}, SettingsError, "optimizer.warmup_steps"),
        ({"gate_samples": [{"text": "a"}], "gate": {"min_exact_match": 0.5}}, DataError, "gate.min_exact_match"),
        ({"max_length": 5, "over_length": "OVER_LENGTH_REFUSE"}, DataError, "dataset"),
        ({"max_length": 5}, DataError, "dataset"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_step_is_taken(
    tmp_path: Path, spec: dict[str, Any], error: type[Exception], field: str
) -> None:
    merged = {name: value for name, value in {**SPEC, **spec}.items() if value is not None}
    events: Events = []
    with pytest.raises(error) as refused:
        run(make_job(tmp_path, SAMPLES, **merged), events.append)
    assert getattr(refused.value, "field", None) == field
    assert "progress" not in kinds(events)
    assert ("loading base" in kinds(events)) == (field == "lora.target_modules")


def test_a_gate_that_is_not_passed_has_a_result_all_the_same(tmp_path: Path) -> None:
    folder = job(tmp_path, steps=1, gate={"min_exact_match": 1.0})
    result, _ = ran(folder)
    assert (result.passed, result.reason) == (False, "GATE_NOT_PASSED")
    assert (folder / "adapter").is_dir()
    assert ran(folder)[0] == result


def test_checkpoints_of_another_spec_or_other_data_are_not_gone_on_from(tmp_path: Path) -> None:
    stopped(job(tmp_path), "progress")
    for samples, spec, field in ((SAMPLES, {"seed": "8"}, "spec"), (reversals(30), {}, "dataset")):
        make_job(tmp_path, samples, **{**SPEC, **spec})
        with pytest.raises(CheckpointError) as refused:
            ran(tmp_path)
        assert refused.value.field == field


def test_a_full_disk_ends_a_job_that_goes_on_once_there_is_room(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = job(tmp_path)
    real = os.replace

    def replace_but(old: Path, new: Path) -> None:
        if new.name == "step-6":
            raise OSError(28, "No space left on device")
        real(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_but)
        with pytest.raises(OutputError) as ended:
            ran(folder)
    assert ended.value.reason == "DISK_FULL"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-3"]
    assert not (folder / "result.json").exists()
    assert ran(folder)[0].digest == undisturbed[1].digest


def test_a_dataset_that_was_not_fetched_is_named(tmp_path: Path) -> None:
    folder = job(tmp_path)
    shutil.rmtree(folder / "data")
    write_dataset(folder / "data", [])
    with pytest.raises(DataError) as refused:
        ran(folder)
    assert refused.value.reason == "DATASET_UNREADABLE"


def test_the_tensors_of_an_adapter_are_float32(undisturbed: tuple[Path, Result, Events]) -> None:
    tensors = load_file(undisturbed[0] / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
