"""A worker's directory, its name, its base and its series: what it keeps, what it tells of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from motley_bases.base_record import BaseRecord, write_base_record
from motley_bases.checkpoint import resolve_base
from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import fingerprint
from motley_trainer.commands.worker import worker
from motley_trainer.errors import SettingsError
from motley_trainer.sizes import parse_size
from motley_trainer.worker.identity import default_name, identify_base
from motley_trainer.worker.metrics import STATES, HttpEndpoint, WorkerMetrics
from motley_trainer.worker.settings import METHODS
from motley_trainer.worker.work import Work
from motley_trainer.worker.workplace import Workplace
from typer import Typer
from typer.testing import CliRunner

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"\| `(motley_worker_\w+)` \| (counter|gauge) \| ([^|]*) \| (.+) \|")


@pytest.mark.parametrize("job_id", ["", ".", "..", "a/b", "../x", "/etc", "-x", "a" * 101, "a\n", "ä"])
def test_an_id_that_must_not_become_a_path_is_refused(tmp_path: Path, job_id: str) -> None:
    with Workplace(tmp_path) as workplace, pytest.raises(ValueError, match="no job's id"):
        workplace.job(job_id)


@pytest.mark.parametrize("digest", ["", "sha256:", f"sha256:{'A' * 64}", f"sha256:{'0' * 64}/..", "../x", "0" * 64])
def test_a_digest_that_must_not_become_a_path_is_refused(tmp_path: Path, digest: str) -> None:
    with Workplace(tmp_path) as workplace, pytest.raises(ValueError, match="no digest"):
        workplace.job("job-1").dataset(digest)


def test_the_directory_of_jobs_is_the_workers_alone(tmp_path: Path) -> None:
    with Workplace(tmp_path / "work") as workplace:
        path = workplace.job("job-1").path
    assert [folder.stat().st_mode & 0o777 for folder in (path, path.parent)] == [0o700, 0o700]


def test_a_directory_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError) as caught:
        Workplace(tmp_path / "file")
    assert (caught.value.reason, caught.value.field) == ("WORK_DIR", "work_dir")


def test_a_job_that_nobody_came_back_to_is_forgotten(tmp_path: Path) -> None:
    with Workplace(tmp_path) as workplace:
        old, new = workplace.job("job-old"), workplace.job("job-new")
        (old.path / "data").mkdir()
        long_ago = old.path.stat().st_mtime - 3600
        for path in (old.path, new.path):
            os.utime(path, (long_ago, long_ago))
        workplace.job("job-new")  # it was leased again
        workplace.forget_old(1800)
        assert [path.name for path in new.path.parent.iterdir()] == ["job-new"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"passed": true, "evaluation": 5}', "nonsense", "\xff"])
def test_a_result_that_is_none_is_no_result(tmp_path: Path, content: str) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        assert job.read_result() is None
        (job.path / "result.json").write_text(content, encoding="latin-1")
        assert job.read_result() is None


def test_only_true_is_passed(tmp_path: Path) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        for word, passed in (("true", True), ("false", False), ("1", False), ('"yes"', False)):
            (job.path / "result.json").write_text(f'{{"passed": {word}, "digest": "d", "evaluation": null}}')
            found = job.read_result()
            assert found is not None
            assert (found.passed, found.digest, found.evaluation) == (passed, "d", {})


ORDER = {"base": "/bases/tiny", "dtype": "float32", "served_quantization": "none", "device": "cpu", "job_id": "job-1"}


@pytest.mark.parametrize("term", ["base", "dtype", "served_quantization", "device", None])
def test_what_was_measured_under_other_terms_is_forgotten(
    tmp_path: Path, term: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        job.write_order(ORDER)
        measured = [job.path / name for name in ("before.json", "evaluation.json", "result.json")]
        for path in measured:
            path.write_text("{}")
        (job.path / "checkpoints" / "step-1").mkdir(parents=True)
        job.write_order(ORDER | ({"job_id": "job-2"} if term is None else {term: "other"}))
    assert [path.exists() for path in measured] == [term is None] * 3
    assert (job.path / "checkpoints" / "step-1").exists(), "whether those will do is the job's to know"
    assert ("terms have changed" in caplog.text) == (term is not None)


def test_an_order_that_cannot_be_read_is_one_of_other_terms(tmp_path: Path) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        for content in ("", "[]", "\xff"):
            (job.path / "job.json").write_text(content, encoding="latin-1")
            (job.path / "result.json").write_text("{}")
            job.write_order(ORDER)
            assert not (job.path / "result.json").exists()


@pytest.mark.parametrize(
    ("names", "left"),
    [(("checkpoints",), ["checkpoints"]), (("checkpoints", "adapter"), ["adapter", "checkpoints"]), ((), None)],
)
def test_what_is_to_stay_of_a_job_stays_and_nothing_else(
    tmp_path: Path, names: tuple[str, ...], left: list[str] | None
) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        for name in ("checkpoints/step-1", "adapter", "data"):
            (job.path / name).mkdir(parents=True)
        (job.path / "job.json").touch()
        assert job.keep(*names) == (left is not None)
    assert job.path.exists() == (left is not None)
    assert left is None or sorted(path.name for path in job.path.iterdir()) == left


def test_checkpoints_of_which_there_are_none_do_not_keep_a_directory(tmp_path: Path) -> None:
    with Workplace(tmp_path) as workplace:
        job = workplace.job("job-1")
        (job.path / "checkpoints" / ".new-step-1").mkdir(parents=True)
        assert not job.keep("checkpoints")
    assert not job.path.exists()


def test_a_base_is_known_by_the_fingerprint_that_its_adapters_name(tmp_path: Path) -> None:
    tiny = resolve_base("tiny")
    assert identify_base("tiny", tmp_path / "cache").fingerprint == fingerprint(tiny)
    assert json.loads((tmp_path / "cache" / "fingerprints.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    original = f"sha256:{'0' * 64}"
    write_base_record(copy, BaseRecord(original, fingerprint(tiny), "nf4"))
    found = identify_base(str(copy), tmp_path / "cache")
    assert (found.fingerprint, found.name, found.directory) == (original, "copy", copy)
    write_base_record(copy, BaseRecord(original, original, "nf4"))
    with pytest.raises(UnreadableBaseError):
        identify_base(str(copy), tmp_path / "cache")


def test_a_name_is_the_same_at_each_start_and_one_for_each_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a host/" + "x" * 100)
    first, second = default_name(tmp_path / "a"), default_name(tmp_path / "b")
    assert first == default_name(tmp_path / "a") != second
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", first)


def test_the_worker_needs_no_torch() -> None:
    code = (
        "import sys, motley_trainer.commands.worker, motley_trainer.worker.supervisor, motley_trainer.worker.identity\n"
        "print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def command() -> Typer:
    app = Typer()
    app.command()(worker)
    return app


@pytest.mark.parametrize(
    ("arguments", "reason", "field"),
    [
        (["--metrics", "nowhere"], "ADDRESS", "metrics"),
        (["--metrics", "127.0.0.1:99999"], "ADDRESS", "metrics"),
        (["--memory-limit", "much"], "SIZE", "memory_limit"),
        (["--server", "nowhere"], "BAD_SETTING", None),
        (["--server", "far.example:1", "--ca-file", "/no/such.pem"], "BAD_SETTING", "ca_file"),
        (["--base", "/no/such"], "NO_SUCH_BASE", None),
        (["--bases", "/proc/no/such"], "BASES_DIR", "bases"),
    ],
)
def test_a_flag_that_cannot_be_is_a_typed_error(
    tmp_path: Path, arguments: list[str], reason: str, field: str | None
) -> None:
    given = ["--base", "tiny", "--work-dir", str(tmp_path), *arguments]
    error = CliRunner().invoke(command(), given, env={"XDG_CONFIG_HOME": str(tmp_path)}).exception
    assert (getattr(error, "reason", error), getattr(error, "field", error)) == (reason, field)


def test_every_flag_is_explained() -> None:
    shown = CliRunner().invoke(command(), ["--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    flags = ("server", "key", "ca-file", "insecure", "base", "work-dir", "name", "metrics", "device", "dtype")
    for flag in (*flags, "memory-limit", "nice", "threads", "once", "bases"):
        assert f"--{flag} " in shown
    assert "SIGTERM" in shown


@pytest.mark.parametrize(("text", "num_bytes"), [("24GiB", 24 << 30), ("1.5 kB", 1500), ("7", 7), ("2mib", 2 << 20)])
def test_a_size_is_read_as_it_is_written(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


ROUTING = {"modules": {"model.layers.0.mlp.up_proj": {"shares": [0.75, 0.25]}}}


def exported(metrics: WorkerMetrics) -> set[tuple[str, str, str]]:
    """Return (name, type, labels) of every series, the name as a query writes it."""
    return {
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            ", ".join(f"`{label}`" for label in sorted({label for one in family.samples for label in one.labels})),
        )
        for family in metrics.registry.collect()
    }


def test_the_document_lists_exactly_what_a_worker_exports() -> None:
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    assert len(rows) == len({row[0] for row in rows})
    metrics = WorkerMetrics()
    metrics.routed(ROUTING)
    assert {(name, kind, labels.strip()) for name, kind, labels, _ in rows} == exported(metrics)


def test_the_document_names_every_state() -> None:
    text = next(row[3] for row in ROW.findall(DOCUMENT.read_text(encoding="utf-8")) if row[0].endswith("jobs_total"))
    assert set(re.findall(r"`(\w+)`", text)) == set(STATES)


def test_a_worker_shows_where_tokens_went_once_it_is_told() -> None:
    metrics, reported = WorkerMetrics(), []  # type: ignore[var-annotated]
    stand_in: Any = SimpleNamespace(job=None, add=reported.append)
    work = Work(stand_in, stand_in, stand_in, stand_in, stand_in, metrics, stand_in)
    work.told({"stage": "training"})
    work.told({"routing": ROUTING})
    assert [event.kind for event in reported] == ["stage", "routing"]
    labels = {"module": "model.layers.0.mlp.up_proj", "expert": "1"}
    assert metrics.registry.get_sample_value("motley_worker_expert_share", labels) == 0.25


def test_a_worker_shows_its_job_and_nothing_once_that_has_ended() -> None:
    metrics = WorkerMetrics()
    page = HttpEndpoint(metrics.registry, "127.0.0.1:0")
    try:
        with pytest.raises(SettingsError, match="cannot show metrics") as taken:
            HttpEndpoint(metrics.registry, f"127.0.0.1:{page.port}")
        metrics.leased(lambda: 42.5)
        metrics.progressed({"step": 7, "loss": 2.5, "tokens_per_second": 900.0})
        metrics.routed(ROUTING)
        metrics.weighed(1 << 20)
        during = urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=10).read().decode()
        metrics.ended("s2ft", "succeeded")
        after = urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=10).read().decode()
    finally:
        page.stop()
    assert taken.value.reason == "ADDRESS"
    for name, value in (("step", 7.0), ("loss", 2.5), ("tokens_per_second", 900.0), ("lease_seconds_left", 42.5)):
        assert f"\nmotley_worker_{name} {value}\n" in during
        assert f"\nmotley_worker_{name} 0.0\n" in after
    assert "motley_worker_child_memory_bytes 1.048576e+06" in during
    assert 'motley_worker_expert_share{expert="0",module="model.layers.0.mlp.up_proj"} 0.75' in during
    assert "motley_worker_expert_share{" not in after
    assert 'motley_worker_jobs_total{method="s2ft",state="succeeded"} 1.0' in after
    assert after.count("motley_worker_jobs_total{") == len(METHODS) * len(STATES)
