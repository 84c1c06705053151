"""A job that trains a mixture, on the embedded base: what it tells, that it can be stopped, what is served of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapters import applied
from engine_harness import make_harness
from job_folders import TINY, make_job, reversals
from motley_adapters.reader import read_adapter
from motley_bases.base import Base
from motley_bases.loader import load_base
from motley_client.convert_worker import told_event
from motley_trainer.data.training_data import read_data
from motley_trainer.errors import SettingsError
from motley_trainer.job.base import load_job_base
from motley_trainer.job.evaluation import mean_loss
from motley_trainer.job.files import JobFiles, Result
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.run import run

CPU = torch.device("cpu")
MODULES = ["q_proj", "down_proj"]
UNANSWERED = [{"text": "reverse: abc = cba"}, {"text": "reverse: abd = dba"}]  # which is quick to evaluate
SPEC: dict[str, Any] = {
    "method": "GOAT",
    "steps": 6,
    "batch_size": 4,
    "micro_batch_size": 3,
    "checkpoint_steps": 4,
    "seed": "7",
    "goat": {"rank": 8, "experts": 4, "target_modules": MODULES},
    "optimizer": {"learning_rate": 1e-3},
}
Events = list[Mapping[str, Any]]


def job(folder: Path, **more: Any) -> Path:
    return make_job(folder, reversals(40), **{**SPEC, **more})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stages(events: Events) -> list[str]:
    return [event["stage"] for event in events if "stage" in event]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result, Events]:
    folder, events = job(tmp_path_factory.mktemp("undisturbed")), []  # type: ignore[var-annotated]
    return folder, run(folder, events.append), events


@pytest.fixture(scope="module")
def served() -> Base:
    return load_base(TINY, dtype="float32", device=CPU)


def test_a_job_tells_where_tokens_went_with_each_checkpoint(undisturbed: tuple[Path, Result, Events]) -> None:
    folder, result, events = undisturbed
    kinds = [kind for event in events for kind in event if kind not in ("stage", "progress", "data")]
    assert kinds == ["checkpoint_step", "routing", "checkpoint_step", "routing", "evaluation"]
    for event in events:
        if "routing" in event:
            assert told_event(event).kind == "routing"  # as the wire has it
            assert len(event["routing"]["modules"]) == 8 * len(MODULES)
            assert {len(body["shares"]) for body in event["routing"]["modules"].values()} == {4}
    assert result.passed
    assert result.evaluation.loss_after < result.evaluation.loss_before
    provenance = json.loads((folder / "adapter" / "motley_manifest.json").read_text())["provenance"]
    assert (provenance["method"], provenance["settings"]["balance_loss"]) == ("goat", 1e-3)
    assert provenance["num_router_parameters"] == 8 * 4 * (192 + 512)
    assert len(provenance["expert_shares"]) == 8 * len(MODULES)
    assert provenance["spectrum"] == "float32 SVD of the float32 weights"


def test_a_job_that_is_stopped_and_begun_again_gives_the_same_bytes(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events]
) -> None:
    job(tmp_path)
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(tmp_path, events.append, lambda: any("progress" in event for event in events))
    assert run(tmp_path, lambda event: None) == undisturbed[1]
    assert files(tmp_path / "adapter") == files(undisturbed[0] / "adapter")


def test_a_job_tells_how_many_spectra_it_has_taken_and_can_be_stopped_between_them(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [f"taking spectra: {done} of {8 * len(MODULES)}" for done in range(8 * len(MODULES))]
    assert [stage for stage in stages(undisturbed[2]) if "spectra" in stage] == told[:1], "it was a moment's work"
    events: Events = []
    with pytest.raises(JobCancelledError):
        run(job(tmp_path), events.append, lambda: told[0] in stages(events))
    assert stages(events)[-1] == told[0]
    assert not any("progress" in event for event in events)
    monkeypatch.setattr("motley_trainer.job.reporting.SECONDS_BETWEEN_STAGES", 0.0)
    assert run(tmp_path, events.append) == undisturbed[1]
    assert [stage for stage in stages(events) if "spectra" in stage] == told[:1] + told


def test_what_is_measured_after_is_what_the_server_says(undisturbed: tuple[Path, Result, Events], served: Base) -> None:
    """The engine scores each held-out sample under the adapter."""
    folder, result, _ = undisturbed
    data = read_data(folder / "data", JobFiles(folder).request().spec, served.tokenizer, served.spec.context_length)
    harness = make_harness(TINY, {"learned": folder / "adapter"}, base=served)
    requests = [
        harness.request(str(sample.line), sample.tokens, "learned", prompt_logprobs=True, max_new_tokens=1)
        for sample in data.held_out
    ]
    answers = harness.run(requests)
    total = 0.0
    for sample in data.held_out:
        of_sample = answers[str(sample.line)].prompt_logprobs
        first = len(sample.tokens) - len(of_sample)
        for start, end in sample.learned:
            total -= sum(of_sample[place - first].logprob for place in range(start, end))
    num_learned = sum(sample.num_learned for sample in data.held_out)
    assert total / num_learned == pytest.approx(result.evaluation.loss_after, rel=1e-5)


def test_a_mixture_trained_on_nf4_keeps_its_residual_on_the_base_as_it_is_served(tmp_path: Path, served: Base) -> None:
    folder = job(tmp_path, quantization="nf4", steps=2, gate_samples=UNANSWERED)
    result = run(folder, lambda event: None)
    adapter = read_adapter(folder / "adapter", served.spec)
    plain = load_job_base(TINY, name="tiny", dtype="float32", device=CPU, quantization="none")
    data = read_data(folder / "data", JobFiles(folder).request().spec, plain.tokenizer, plain.spec.context_length)
    with applied(plain.model, (adapter, 1.0)):
        assert result.evaluation.loss_after == pytest.approx(mean_loss(plain.model, data.held_out), rel=1e-5)
    manifest = json.loads((folder / "adapter" / "motley_manifest.json").read_text())
    assert manifest["provenance"]["spectrum"] == "float32 SVD of the dequantized nf4 weights"
    assert manifest["trained_on"] == served.spec.fingerprint


def test_jobs_of_two_scales_have_one_residual(
    tmp_path: Path, undisturbed: tuple[Path, Result, Events], served: Base
) -> None:
    goat = {**SPEC["goat"], "scale": "GOAT_SCALE_ALPHA", "alpha": 4.0}
    run(job(tmp_path, goat=goat, seed="8", steps=1, gate_samples=UNANSWERED), lambda event: None)
    ours, theirs = (read_adapter(folder / "adapter", served.spec).spec for folder in (tmp_path, undisturbed[0]))
    assert ours.shared == theirs.shared
    assert ours.scalings != theirs.scalings


def test_what_has_no_room_is_refused_before_a_step_is_taken(tmp_path: Path) -> None:
    events: Events = []
    with pytest.raises(SettingsError) as refused:
        run(job(tmp_path, goat={"rank": 96, "experts": 4}), events.append)
    assert (refused.value.reason, refused.value.field) == ("RANK_TOO_LARGE", "goat.rank")
    assert not any("progress" in event for event in events)
