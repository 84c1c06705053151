"""Jobs whose process is ended by SIGKILL in each of their stages: what one undisturbed process makes, to the byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_folders import make_job
from killed_jobs import KilledJobs, killed_jobs
from loram_jobs import SAMPLES, SPEC, loram_job, make_base
from motley_trainer.worker.work import child_environ

STEPS = {"steps": 5, "checkpoint_steps": 2}
BEFORE = ["reading data", "measuring before", "naming before.json"]
AFTER = ["measuring after", "naming evaluation.json", "writing", "naming adapter", "naming result.json"]
NUM_LINEARS = 4 * 7


@pytest.fixture(scope="module")
def jobs() -> Iterator[KilledJobs]:
    with killed_jobs() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def in_steps(folder: str) -> list[str]:
    """Return places in training: with nothing kept, while it is kept, once it is, and a step that is lost again."""
    return ["progress 1", f"naming {folder}/step-2", "checkpoint_step 2", "progress 3"]


def killed_at_each(jobs: KilledJobs, folder: Path, places: list[str]) -> Counter[str]:
    """Kill a job at one place after the other, let it end, and count what its processes told."""
    told = Counter[str]()
    for place in places:
        told.update(jobs.kill_at(folder, place))
    told.update(jobs.finish(folder))
    # A process whose job lacks the result's file alone has nothing to read.
    assert told["reading data"] == len(places)
    return told


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_qloram_that_is_killed_in_each_stage_comes_to_the_same_bytes(
    jobs: KilledJobs, base: Path, tmp_path: Path
) -> None:
    killed, undisturbed = (
        loram_job(tmp_path / name, base, quantization="nf4", align={"steps": 5}, **STEPS)
        for name in ("killed", "undisturbed")
    )
    jobs.finish(undisturbed)
    told = killed_at_each(
        jobs,
        killed,
        [
            *BEFORE,
            "pruning", "naming stages/pruned",
            "aligning", *in_steps("stages/aligning"), "naming stages/aligned",
            "training", *in_steps("checkpoints"),
            *AFTER,
        ],
    )  # fmt: skip
    assert files(killed) == files(undisturbed)
    # As often as it was killed in, and once more; then never again.
    assert (told["measuring before"], told["pruning"], told["aligning"]) == (3, 3, 7)
    # Of both trainings: until there was a checkpoint.
    assert told["progress 1"] == 2 * 3


def test_a_goat_that_is_killed_in_each_stage_comes_to_the_same_bytes(
    jobs: KilledJobs, base: Path, tmp_path: Path
) -> None:
    """Held against a process as a worker starts it."""
    killed, undisturbed = (tmp_path / name for name in ("killed", "undisturbed"))
    for folder in (killed, undisturbed):
        folder.mkdir()
        make_job(folder, SAMPLES, method="GOAT", base=base, goat={"rank": 8, "experts": 4}, **{**SPEC, **STEPS})
    command = [sys.executable, "-m", "motley_trainer.job", str(undisturbed)]
    spectra = f"taking spectra: 0 of {NUM_LINEARS}"
    with subprocess.Popen(command, env=child_environ(os.environ, 1), stdout=subprocess.DEVNULL) as process:
        told = killed_at_each(jobs, killed, [*BEFORE, "training", spectra, *in_steps("checkpoints"), *AFTER])
    assert process.returncode == 0
    assert files(killed) == files(undisturbed)
    assert told["measuring before"] == 3
    assert told[spectra] == 4, "which checkpoints have what came of"
