"""Workers that have one directory for bases: of one job's, only the first that is put there stays."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from made_bases_files import FILES, FINGERPRINT, content, far, kept_in, write_base
from motley_trainer.errors import OutputError
from motley_trainer.worker import made_bases
from motley_trainer.worker.made_bases import MadeBases, NotWantedError


@pytest.mark.parametrize("there", ["another base", "something else"])
@pytest.mark.parametrize("is_far", [False, True], ids=["near", "far"])
def test_what_is_in_its_place_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_far: bool, there: str
) -> None:
    if is_far:
        far(monkeypatch)
    made, bases, place = tmp_path / "base", MadeBases(tmp_path / "bases"), tmp_path / "bases" / "job-1"
    write_base(made)
    write_base(place, f"sha256:{'2' * 64}")
    if there == "something else":
        (place / "loqt_manifest.json").unlink()
    before = content(place)
    with pytest.raises(OutputError, match="never replaced") as caught:
        bases.take(made, "job-1", FINGERPRINT)
    assert (caught.value.reason, caught.value.field) == ("BASE_EXISTS", "bases")
    assert (content(place), content(made)) == (before, FILES)


@pytest.mark.parametrize("fingerprint", [FINGERPRINT, f"sha256:{'2' * 64}"], ids=["the same", "another"])
def test_of_two_workers_that_copy_at_once_the_first_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fingerprint: str
) -> None:
    far(monkeypatch)
    for name, of in (("late", FINGERPRINT), ("early", fingerprint)):
        write_base(tmp_path / name / "base", of)
        (tmp_path / name / "base" / "model.safetensors").write_text(name)
    late, early = MadeBases(tmp_path / "bases"), MadeBases(tmp_path / "bases")
    real, copied = shutil.copyfile, []

    def copy(source: Path, target: Path) -> None:
        copied.append(source)
        if len(copied) == 2:  # in the middle of the late one's
            early.take(tmp_path / "early" / "base", "job-1", fingerprint)
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    if fingerprint == FINGERPRINT:
        assert late.take(tmp_path / "late" / "base", "job-1", FINGERPRINT) == tmp_path / "bases" / "job-1"
    else:
        with pytest.raises(OutputError, match="never replaced"):
            late.take(tmp_path / "late" / "base", "job-1", FINGERPRINT)
    assert content(tmp_path / "bases" / "job-1") == content(tmp_path / "early" / "base")
    assert kept_in(tmp_path / "bases") == ["job-1"]


def test_the_last_look_and_the_rename_are_one_workers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "base")
    real, was_held = os.rename, []

    def rename(source: Path, target: Path) -> None:
        with (tmp_path / "bases" / made_bases.LOCK_FILE).open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        was_held.append(target)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    MadeBases(tmp_path / "bases").take(tmp_path / "base", "job-1", FINGERPRINT)
    assert was_held == [tmp_path / "bases" / "job-1"]


def test_a_base_that_is_not_wanted_any_more_is_not_put_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far(monkeypatch)
    write_base(tmp_path / "base")
    for num_asked in range(5):  # before the rename, before each of three files, and before the rename of the copy
        asked = iter(range(9))
        with pytest.raises(NotWantedError):
            MadeBases(tmp_path / "bases").take(
                tmp_path / "base", "job-1", FINGERPRINT, lambda asked=asked, end=num_asked: next(asked) == end
            )
        assert kept_in(tmp_path / "bases") == []
    assert content(tmp_path / "base") == FILES
