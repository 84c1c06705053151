"""A job's stages: what a stage left is found again as it was written, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from motley_trainer.job.stages import STAGE_FILE, Stages

BINDING = {"spec": "sha256:a", "base": "b"}


def fill(aside: Path) -> dict[str, object]:
    (aside / "weights").write_bytes(b"12345")
    return {"fingerprint": "sha256:c"}


def test_what_a_stage_left_is_found_by_its_job_alone(tmp_path: Path) -> None:
    assert Stages(tmp_path, BINDING).find("pruned") is None
    left = Stages(tmp_path, BINDING).write("pruned", fill)
    found = Stages(tmp_path, BINDING).find("pruned")
    assert found is not None
    assert (found.directory, found.facts) == (left.directory, {"fingerprint": "sha256:c"})
    assert Stages(tmp_path, {**BINDING, "base": "d"}).find("pruned") is None


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": lambda left: (left / "weights").write_bytes(b"12344"),
    "the end": lambda left: (left / "weights").write_bytes(b"1234"),
    "a file": lambda left: (left / "weights").unlink(),
    "half of what it says": lambda left: (left / STAGE_FILE).write_bytes((left / STAGE_FILE).read_bytes()[:40]),
    "all of what it says": lambda left: (left / STAGE_FILE).write_bytes(b""),
    "its meaning": lambda left: (left / STAGE_FILE).write_bytes(b"[]"),
    "its files": lambda left: (left / STAGE_FILE).write_bytes(b'{"binding": {"spec": "sha256:a", "base": "b"}}'),
    "its letters": lambda left: (left / STAGE_FILE).write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_lost_something_since_is_made_anew(tmp_path: Path, damage: str) -> None:
    stages = Stages(tmp_path, BINDING)
    DAMAGES[damage](stages.write("pruned", fill).directory)
    assert stages.find("pruned") is None
    assert stages.write("pruned", fill).facts == {"fingerprint": "sha256:c"}
    assert stages.find("pruned") is not None
