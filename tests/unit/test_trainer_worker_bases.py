"""A worker keeps the bases that its jobs make: each whole or not at all, however often it is cut, and tells of it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_worker_service import FakeJob
from made_bases_files import FILES, FINGERPRINT, content, far, kept_in, write_base
from motley.v1 import training_pb2 as pb
from motley_client.convert_worker import told_event
from motley_client.errors import FailedPreconditionError
from motley_client.types_worker import JobEnding, LeaseEnd
from motley_client.worker_calls import LeaseClient
from motley_trainer.errors import OutputError, SettingsError
from motley_trainer.files import durable
from motley_trainer.worker.made_bases import MadeBases, is_base
from motley_trainer.worker.settings import METHODS
from motley_trainer.worker.work import parts_of
from worker_house import WorkerHouse, eventually, worker_house


@pytest.fixture
def house(tmp_path: Path) -> Iterator[WorkerHouse]:
    with worker_house(tmp_path / "work") as house:
        house.bases = tmp_path / "bases"
        yield house


def reasons(house: WorkerHouse) -> list[tuple[str, str]]:
    """Return how leases were told to have ended, in order."""
    reports = [request for name, request in house.fake.calls if name == "ReportJob"]
    endings = [request.ending for request in reports if request.HasField("ending")]
    return [(pb.JobState.Name(one.state).removeprefix("JOB_STATE_").lower(), one.reason) for one in endings]


def times_trained(job: FakeJob) -> int:
    return [event.stage for event in job.events].count("reading data")


def test_a_base_is_kept_told_of_and_published_nowhere(house: WorkerHouse, tmp_path: Path) -> None:
    job, other = house.fake.add_base_job(), house.fake.add_job(b"1")

    house.work("passes")

    place = tmp_path / "bases" / job.id
    assert (job.state, job.reason) == ("succeeded", "")
    assert job.events[-2].stage == "keeping the base"
    told = pb.TrainedBase(directory=str(place), fingerprint=FINGERPRINT, num_merges=2, size_bytes=7002)
    assert job.events[-1].base == told
    assert content(place) == FILES
    assert kept_in(place.parent) == [job.id]
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert other.state == "succeeded", "adapters go on as they did"
    assert [request.adapter_name for name, request in house.adapters.calls if name == "UploadAdapter"] == ["legal"]
    assert house.files() == []
    assert house.value("jobs_total", method="loqt", state="succeeded") == 1


@pytest.mark.parametrize("has_place", [True, False])
def test_only_a_worker_with_a_place_for_bases_says_that_it_makes_some(house: WorkerHouse, has_place: bool) -> None:
    house.bases = house.bases if has_place else None
    house.work("passes", lambda: bool(house.fake.workers))
    methods = {pb.TrainingMethod.Name(number) for number in house.fake.workers["w1"].methods}
    everything = {f"TRAINING_METHOD_{method.upper()}" for method in METHODS}
    assert everything - methods == (set() if has_place else {"TRAINING_METHOD_LOQT"})


def test_without_a_place_such_a_job_is_given_back(house: WorkerHouse) -> None:
    job, house.bases = house.fake.add_base_job(), None
    house.work("passes", lambda: bool(reasons(house)))
    assert reasons(house)[0] == ("queued", "WORKER_FAULT")
    assert times_trained(job) == 0


def test_a_base_that_does_not_pass_its_gate_is_not_kept(house: WorkerHouse, tmp_path: Path) -> None:
    job = house.fake.add_base_job()
    house.work("rejects")
    assert (job.state, job.reason) == ("rejected", "GATE_NOT_PASSED")
    assert kept_in(tmp_path / "bases") == []
    assert house.files() == []


def after_taking(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], None]) -> None:
    """Have something happen once a base has been taken for the first time, and the worker fail then."""
    real, taken = MadeBases.take, []

    def take(self: MadeBases, *arguments: Any) -> Path:
        place = real(self, *arguments)
        if not taken:
            taken.append(place)
            then(place)
            raise OSError(errno.EIO, "broken", str(place))
        return place

    monkeypatch.setattr(MadeBases, "take", take)


def test_what_was_cut_before_it_was_told_is_told_and_not_trained_again(
    house: WorkerHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_taking(monkeypatch, lambda place: None)
    job = house.fake.add_base_job()
    house.work("passes")
    assert reasons(house) == [("queued", "WORKER_FAULT"), ("succeeded", "")]
    assert times_trained(job) == 1
    assert content(tmp_path / "bases" / job.id) == FILES


def test_a_base_that_is_gone_is_made_again(house: WorkerHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_taking(monkeypatch, shutil.rmtree)
    job = house.fake.add_base_job()
    house.work("passes")
    assert reasons(house) == [("queued", "WORKER_FAULT"), ("succeeded", "")]
    assert times_trained(job) == 2
    assert content(tmp_path / "bases" / job.id) == FILES


def test_a_full_disk_gives_the_job_back_and_leaves_nothing_half_done(
    house: WorkerHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far(monkeypatch)
    real, calls = shutil.copyfile, []

    def copy(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    seen: list[list[str]] = []
    job = house.fake.add_base_job()
    house.work("passes", lambda: seen.append(os.listdir(tmp_path / "bases")) or house.is_idle())  # type: ignore[func-returns-value]
    assert reasons(house) == [("queued", "DISK_FULL"), ("succeeded", "")]
    assert times_trained(job) == 1
    assert content(tmp_path / "bases" / job.id) == FILES
    assert kept_in(tmp_path / "bases") == [job.id]
    assert house.value("faults_total", reason="DISK_FULL") == 1


class CrashError(BaseException):
    """The process has stopped here."""


CHANGES = ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (shutil, "copyfile"), (Path, "mkdir"))


def stopping(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Stop before the change of this number and do nothing more; return the list of the changes."""
    done: list[str] = []

    def broken(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **keywords: Any) -> Any:
            if len(done) >= number:
                raise CrashError(name)
            done.append(name)
            return real(*arguments, **keywords)

        return change

    for owner, name in CHANGES:
        monkeypatch.setattr(owner, name, broken(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("before", ["nothing", "half a copy"])
@pytest.mark.parametrize("is_far", [False, True], ids=["near", "far"])
def test_a_base_is_whole_in_one_of_both_places_whenever_it_is_cut(tmp_path: Path, is_far: bool, before: str) -> None:
    number, num_cuts = 0, 0
    while True:
        root = tmp_path / str(number)
        made, bases = root / "jobs" / "job-1" / "base", MadeBases(root / "bases")
        write_base(made)
        if before == "half a copy":
            write_base(root / "bases" / ".new-job-1")
            (root / "bases" / ".new-job-1" / "left over").touch()
        with pytest.MonkeyPatch.context() as patch:
            if is_far:
                far(patch)
            stopping(patch, number)
            try:
                bases.take(made, "job-1", FINGERPRINT)
            except CrashError:
                num_cuts += 1
            else:
                break
        place = root / "bases" / "job-1"
        assert is_base(made, FINGERPRINT) or is_base(place, FINGERPRINT)
        assert not place.exists() or content(place).keys() == FILES.keys(), "nothing half done is seen"
        with pytest.MonkeyPatch.context() as patch:
            if is_far:
                far(patch)
            assert bases.take(made, "job-1", FINGERPRINT) == place
        assert content(place) == FILES
        bases.forget_old(-1)
        assert kept_in(root / "bases") == ["job-1"]
        number += 1
    assert num_cuts >= (10 if is_far else 2)
    assert content(root / "bases" / "job-1") == FILES
    assert is_far == made.exists()


def test_a_base_that_is_nowhere_is_said_to_be(tmp_path: Path) -> None:
    bases = MadeBases(tmp_path / "bases")
    write_base(tmp_path / "base", f"sha256:{'2' * 64}")
    with pytest.raises(FileNotFoundError, match="job-1"):
        bases.take(tmp_path / "base", "job-1", FINGERPRINT)
    assert not bases.has("job-1", FINGERPRINT)
    for text in ("", "[]", "{}", "5", "\xff"):
        (tmp_path / "base" / "loqt_manifest.json").write_text(text, encoding="latin-1")
        assert not is_base(tmp_path / "base", FINGERPRINT)


@pytest.mark.parametrize(("number", "reason"), [(errno.EDQUOT, "DISK_FULL"), (errno.EROFS, "OUTPUT_UNWRITABLE")])
def test_what_a_disk_refuses_is_the_workers_fault_in_the_jobs_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    write_base(tmp_path / "base")
    bases = MadeBases(tmp_path / "bases")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, "refused", str(target))

    monkeypatch.setattr(durable.os, "rename", refuse)  # type: ignore[attr-defined]
    with pytest.raises(OutputError) as caught:
        bases.take(tmp_path / "base", "job-1", FINGERPRINT)
    assert caught.value.reason == reason
    assert is_base(tmp_path / "base", FINGERPRINT)


def test_copies_that_nobody_came_back_to_are_forgotten_and_bases_stay(tmp_path: Path) -> None:
    bases = MadeBases(tmp_path / "bases")
    for name in ("job-1", ".new-job-2", ".new-job-3"):
        write_base(tmp_path / "bases" / name)
    for name in ("job-1", ".new-job-2"):
        for path in (tmp_path / "bases" / name).iterdir():
            os.utime(path, (1, 1))
        os.utime(tmp_path / "bases" / name, (1, 1))
    os.utime(tmp_path / "bases" / ".new-job-3", (1, 1))  # while one of its files grows
    bases.forget_old(1800)
    assert sorted(os.listdir(tmp_path / "bases")) == [".new-job-3", "job-1"]


def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError) as caught:
        MadeBases(tmp_path / "file" / "bases")
    assert (caught.value.reason, caught.value.field) == ("BASES_DIR", "bases")


def test_a_job_whose_place_is_taken_fails_and_says_where_its_base_is(house: WorkerHouse, tmp_path: Path) -> None:
    job = house.fake.add_base_job()
    write_base(tmp_path / "bases" / job.id, f"sha256:{'2' * 64}")
    house.work("passes")
    assert (job.state, job.reason) == ("failed", "BASE_EXISTS")
    assert f"7 days its base stays with worker w1, in jobs/{job.id}/base of its work directory" in job.message
    assert content(house.directory / "jobs" / job.id / "base") == FILES


def test_a_base_that_the_server_does_not_take_is_said_to_be_there(
    house: WorkerHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, real = house.fake.add_base_job(), LeaseClient.report_job

    async def report(self: LeaseClient, events: Any, num: int, ending: JobEnding | None = None, **more: Any) -> bool:
        if ending is not None and ending.end is LeaseEnd.SUCCEEDED:
            raise FailedPreconditionError("no base", reason="NO_BASE_MADE")
        return await real(self, events, num, ending, **more)

    monkeypatch.setattr(LeaseClient, "report_job", report)
    house.work("passes")
    assert (job.state, job.reason) == ("failed", "NO_BASE_MADE")
    assert f"its base stays with worker w1, in {job.id} of its `--bases`" in job.message
    assert content(tmp_path / "bases" / job.id) == FILES


def test_a_cancellation_is_heard_while_a_base_is_copied(
    house: WorkerHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far(monkeypatch)
    copyfile, take, job = shutil.copyfile, MadeBases.take, house.fake.add_base_job()
    asked: list[Callable[[], bool]] = []

    def take_so(self: MadeBases, made: Path, id: str, fingerprint: str, is_unwanted: Callable[[], bool]) -> Path:
        asked.append(is_unwanted)
        return take(self, made, id, fingerprint, is_unwanted)

    def copy(source: Path, target: Path) -> None:
        job.cancel_requested = True
        assert eventually(asked[0])
        copyfile(source, target)

    monkeypatch.setattr(MadeBases, "take", take_so)
    monkeypatch.setattr(shutil, "copyfile", copy)
    house.work("passes")
    assert (job.state, job.message) == ("cancelled", "")
    assert kept_in(tmp_path / "bases") == []
    assert [name for name in house.files() if "base" in name] == []


@pytest.mark.parametrize(("num_merges", "sizes"), [(1000, [1000]), (2001, [1000, 1000, 1])])
def test_many_merges_are_told_in_parts_that_a_server_takes(num_merges: int, sizes: list[int]) -> None:
    merges = [{"step": step, "digest": FINGERPRINT} for step in range(num_merges)]
    parts = parts_of({"merges": {"merges": merges}})
    assert [len(part["merges"]["merges"]) for part in parts] == sizes
    assert [merge for part in parts for merge in part["merges"]["merges"]] == merges
    assert all(told_event(part).kind == "merges" for part in parts)


@pytest.mark.parametrize("line", [{"stage": "x"}, {"merges": 5}, {"merges": {"merges": {}}}, {"merges": None}])
def test_what_else_is_told_stays_as_it_is(line: dict[str, Any]) -> None:
    assert parts_of(line) == [line]
