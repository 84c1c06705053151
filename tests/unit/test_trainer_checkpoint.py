"""A training that was interrupted, wherever that was, gives the bits of one that was not."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from motley_trainer.errors import CheckpointError, OutputError
from motley_trainer.files.durable import sweep, write_folder, write_json
from motley_trainer.job.checkpoint import Checkpoint, Checkpoints
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.spec.settings import (
    ChannelScore,
    LoraSettings,
    OptimizerSettings,
    S2ftSettings,
    Schedule,
    TrainingMethod,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from small_trainings import BINDING, SmallTraining, stop_after

SETTINGS: dict[str, Any] = {
    "settings": LoraSettings(rank=3, dropout=0.3),
    "micro_batch_size": 3,
    "optimizer": OptimizerSettings(5e-3, Schedule.COSINE, weight_decay=0.1),
}


class Died(BaseException):
    """The process is gone."""


S2FT: dict[str, Any] = {
    **SETTINGS,
    "method": TrainingMethod.S2FT,
    "settings": S2ftSettings(o_share=0.5, down_share=0.1, v_share=0.5, score=ChannelScore.GRADIENT),
}


def small(settings: Mapping[str, Any] = SETTINGS) -> SmallTraining:
    return SmallTraining.of(**settings)


def written(training: SmallTraining, folder: Path) -> bytes:
    training.attached.write(folder, {})
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    training = small()
    training.train(folder / "checkpoints")
    return written(training, folder / "adapter")


# --- Going on


@pytest.mark.parametrize("steps", [[1], [3, 2], [4], [2, 2, 2, 2]], ids=str)
def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path: Path, undisturbed: bytes, steps: list[int]) -> None:
    for count in steps:
        with pytest.raises(JobCancelledError):
            small().train(tmp_path / "checkpoints", stop_after(count))
    training = small()
    training.train(tmp_path / "checkpoints")
    assert written(training, tmp_path / "adapter") == undisturbed


def test_a_training_that_died_goes_on_from_its_last_checkpoint_to_the_same_bytes(
    tmp_path: Path, undisturbed: bytes
) -> None:
    def die() -> bool:
        raise Died

    looks = stop_after(7)
    with pytest.raises(Died):
        small().train(tmp_path / "checkpoints", lambda: looks() and die())
    training = small()
    training.train(tmp_path / "checkpoints")
    assert [event["checkpoint_step"] for event in training.events if "checkpoint_step" in event] == [8, 10]
    assert written(training, tmp_path / "adapter") == undisturbed


def test_a_finished_training_is_not_trained_again(tmp_path: Path, undisturbed: bytes) -> None:
    small().train(tmp_path / "checkpoints")
    training = small()
    assert training.train(tmp_path / "checkpoints").step == 10
    assert training.events == []
    assert written(training, tmp_path / "adapter") == undisturbed


def test_an_s2ft_that_is_stopped_and_one_that_died_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Stopped twice, killed once; its channels were chosen by gradients, which takes samples and the base alone."""

    def die() -> bool:
        raise Died

    whole = small(S2FT)
    whole.train(tmp_path / "whole")
    for count in (3, 2):
        with pytest.raises(JobCancelledError):
            small(S2FT).train(tmp_path / "checkpoints", stop_after(count))
    looks = stop_after(4)
    with pytest.raises(Died):
        small(S2FT).train(tmp_path / "checkpoints", lambda: looks() and die())
    last = small(S2FT)
    assert last.train(tmp_path / "checkpoints").step == 10
    assert [event["checkpoint_step"] for event in last.events if "checkpoint_step" in event] == [10]
    undisturbed = written(whole, tmp_path / "a")
    assert len(undisturbed) > 1000
    assert written(last, tmp_path / "b") == undisturbed


# Every change that keeping a checkpoint makes on disk, in its order: the process dies before one of them.
CHANGES = ("mkdir", "save_file", "write_text", "fsync", "replace", "rmtree")


def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Have the process die before a change on disk, counted from the beginning; return the list of those made."""
    made: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) == at:
                raise Died
            return real(*arguments, **keywords)

        return change

    monkeypatch.setattr(Path, "mkdir", watched("mkdir", Path.mkdir))
    monkeypatch.setattr(Path, "write_text", watched("write_text", Path.write_text))
    monkeypatch.setattr("motley_trainer.job.checkpoint.save_file", watched("save_file", save_file))
    monkeypatch.setattr(os, "fsync", watched("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", watched("replace", os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
    return made


def test_a_process_that_dies_at_any_change_on_disk_leaves_a_checkpoint_that_is_whole(tmp_path: Path) -> None:
    """Two checkpoints are there, and the third is being kept; then it is kept after all, over what was left."""
    seen: set[str] = set()
    for at in range(1, 100):
        folder = tmp_path / str(at)
        checkpoints = Checkpoints(folder, BINDING)
        for step in (1, 2):
            checkpoints.save(checkpoint(step))
        with pytest.MonkeyPatch.context() as monkeypatch:
            made = dying(monkeypatch, at)
            try:
                checkpoints.save(checkpoint(3))
            except Died:
                is_dead = True
            else:
                is_dead = False
        seen.update(made)
        has_new = "replace" in made[:-1] if is_dead else True
        assert latest(folder) == (3 if has_new else 2)
        assert not list(folder.glob(".new-*"))
        checkpoints.save(checkpoint(3))
        assert [path.name for path in sorted(folder.iterdir())] == ["step-2", "step-3"]
        assert latest(folder) == 3
        if not is_dead:
            break
    assert seen == set(CHANGES)
    assert at > 8


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, 1.0 / 3.0, {"a": torch.full((5,), float(step)), "b": torch.arange(step, dtype=torch.uint8)})


def latest(folder: Path) -> int | None:
    found = Checkpoints(folder, BINDING).latest()
    return None if found is None else found.step


# --- Files that are not whole


def test_a_checkpoint_is_what_was_kept(tmp_path: Path) -> None:
    Checkpoints(tmp_path, BINDING).save(checkpoint(3))
    found = Checkpoints(tmp_path, BINDING).latest()
    assert found is not None
    assert (found.step, found.loss) == (3, 1.0 / 3.0)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in checkpoint(3).tensors.items())
    assert found.tensors.keys() == checkpoint(3).tensors.keys()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 9, 10, 11):
        Checkpoints(tmp_path, BINDING).save(checkpoint(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in tmp_path.rglob("*"))


def test_nothing_is_there_at_first(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None


def damaged(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["begin", "middle", "end", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        Checkpoints(tmp_path, BINDING).save(checkpoint(step))
    path = tmp_path / "step-2" / name
    if damage == "gone":
        path.unlink()
    elif damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -20])
    else:
        damaged(path, {"begin": 0.0, "middle": 0.5, "end": 0.95}[damage])
    assert latest(tmp_path) == 1
    Checkpoints(tmp_path, BINDING).save(checkpoint(2))  # in the place of the damaged one
    assert latest(tmp_path) == 2


def test_no_byte_of_a_checkpoints_state_can_change_unseen(tmp_path: Path) -> None:
    Checkpoints(tmp_path, BINDING).save(checkpoint(1))
    path = tmp_path / "step-1" / "state.json"
    content = path.read_bytes()
    for place in range(len(content)):
        if content[place : place + 1].isspace():
            continue
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert latest(tmp_path) is None, place


def test_a_checkpoint_under_another_steps_name_is_not_taken_for_it(tmp_path: Path) -> None:
    Checkpoints(tmp_path, BINDING).save(checkpoint(1))
    (tmp_path / "step-1").rename(tmp_path / "step-7")
    assert latest(tmp_path) is None


@pytest.mark.parametrize("name", BINDING)
def test_a_checkpoint_of_another_training_is_refused_by_what_differs(tmp_path: Path, name: str) -> None:
    Checkpoints(tmp_path, BINDING).save(checkpoint(1))
    with pytest.raises(CheckpointError) as refused:
        Checkpoints(tmp_path, {**BINDING, name: "other"}).latest()
    assert (refused.value.reason, refused.value.field) == ("CHECKPOINT_OF_ANOTHER", name)


# --- A disk that is full


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "call", ["os.fsync", "os.replace", "pathlib.Path.mkdir", "motley_trainer.job.checkpoint.save_file"]
)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "DISK_FULL"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "DISK_FULL"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "DISK_FULL"),
        (OSError(errno.EROFS, "Read-only file system"), "OUTPUT_UNWRITABLE"),
        (SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"), "OUTPUT_UNWRITABLE"),
    ],
)
def test_a_disk_that_is_full_is_told_and_what_was_kept_stays(
    tmp_path: Path, call: str, error: Exception, reason: str
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise error

    Checkpoints(tmp_path, BINDING).save(checkpoint(1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(call, refuse)
        with pytest.raises(OutputError) as refused:
            Checkpoints(tmp_path, BINDING).save(checkpoint(2))
    assert (refused.value.reason, refused.value.field) == (reason, "step-2")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert latest(tmp_path) == 1


# --- Folders and files that appear whole


def test_everything_is_safe_before_it_has_its_name_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(file: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        real_fsync(file)

    def replace(old: Path, new: Path) -> None:
        order.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)

    def fill(folder: Path) -> None:
        for name in ("a", "b"):
            (folder / name).write_text(name)

    write_folder(tmp_path / "whole", fill)
    assert order == ["a", "b", ".new-whole", "rename", tmp_path.name]
    order.clear()
    write_json(tmp_path / "file.json", {"a": 1})
    assert order == [".new-file.json", "rename", tmp_path.name]


def test_what_an_interrupted_write_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".new-folder").mkdir()
    (tmp_path / ".new-folder" / "file").write_text("half")
    (tmp_path / ".new-file.json").write_text("half")
    (tmp_path / "kept").write_text("whole")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
