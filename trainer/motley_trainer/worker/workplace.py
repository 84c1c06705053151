"""A worker's directory: whose it is, one directory a job in it, and what stays when a job has ended.

Owns the names of files that worker and job share, and that each appears whole. Knows nothing of servers and
processes. Everything blocks; whoever must not, runs it on a thread.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from motley_trainer.errors import SettingsError
from motley_trainer.worker.made_bases import MadeBases

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

CHECKPOINTS, ADAPTER, BASE, RESULT = "checkpoints", "adapter", "base", "result.json"
TERMS = ("base", "dtype", "served_quantization", "device")  # what a gate's measurement holds for
MEASURED = (RESULT, "evaluation.json", "before.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job came to: the digest of the adapter or base, how it was evaluated, and whether it passed its gate.

    Semantics: `base` is what the job told of the base that it made, None for an adapter.
    """

    digest: str
    evaluation: Mapping[str, Any]
    passed: bool
    reason: str
    message: str
    base: Mapping[str, Any] | None = None


class Workplace:
    """Hold a worker's directory, alone, and know where it keeps bases, if it makes any.

    Raises: SettingsError with reason WORK_DIR_IN_USE if another worker holds it, WORK_DIR if it cannot be used.
    """

    def __init__(self, directory: Path, bases: MadeBases | None = None) -> None:
        self.directory = directory.absolute()
        self.bases = bases
        self._jobs = self.directory / "jobs"
        try:
            self._jobs.mkdir(mode=0o700, parents=True, exist_ok=True)  # tenants' data lies here
            self._lock = (self.directory / "lock").open("w")
        except OSError as error:
            raise SettingsError(f"{directory} cannot be used: {error}", reason="WORK_DIR", field="work_dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            message = f"another worker works in {directory}: give this one a directory of its own"
            raise SettingsError(message, reason="WORK_DIR_IN_USE", field="work_dir") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def fingerprints(self) -> Path:
        """Return where fingerprints of bases are remembered."""
        return self.directory / "fingerprints"

    @property
    def spectra(self) -> Path:
        """Return where jobs keep the spectra of their base's weights, each for the next."""
        return self.directory / "spectra"

    def job(self, job_id: str) -> JobDirectory:
        """Return a job's directory, made if it is not there.

        Raises: ValueError for an id that must not become a path; OSError.
        """
        if _JOB_ID.fullmatch(job_id) is None:
            raise ValueError(f"{job_id[:100]!r} is no job's id")
        path = self._jobs / job_id
        path.mkdir(mode=0o700, exist_ok=True)
        os.utime(path)
        return JobDirectory(path)

    def forget_old(self, keep_seconds: float) -> None:
        """Remove the directories of jobs that did not come back; each lease of a job makes its directory new."""
        if self.bases is not None:
            self.bases.forget_old(keep_seconds)
        for path in self._jobs.iterdir():
            try:
                if time.time() - path.stat().st_mtime > keep_seconds:
                    shutil.rmtree(path)
                    log.info("%s: forgotten, nobody came back to it", path.name)
            except OSError as error:
                log.warning("%s: it should be forgotten, but stays: %s", path.name, error)


@dataclass(frozen=True, slots=True)
class JobDirectory:
    """Where one job lies; the process that trains it knows the same names."""

    path: Path

    @property
    def adapter(self) -> Path:
        """Return where the trained adapter is, once it is whole."""
        return self.path / ADAPTER

    @property
    def base(self) -> Path:
        """Return where a base is that was made, once it is whole and until it is taken from there."""
        return self.path / BASE

    def dataset(self, digest: str) -> Path:
        """Return where a dataset lies.

        Raises: ValueError for what is no digest.
        """
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise ValueError(f"{digest[:100]!r} is no digest")
        return self.path / "data" / f"{match[1]}.jsonl"

    def other_adapter(self, index: int) -> Path:
        """Return where an adapter lies that the job was told to keep clear of."""
        return self.path / "adapters" / str(index)

    def write_order(self, order: Mapping[str, Any]) -> None:
        """Write what the job is told; what was measured under other terms is forgotten, to be measured anew."""
        if self._terms() not in (None, _terms_of(order)):
            log.warning("%s: the terms have changed, so what was measured is measured again", self.path.name)
            for name in MEASURED:
                (self.path / name).unlink(missing_ok=True)
        aside = self.path / ".job.json.new"
        with aside.open("w", encoding="utf-8") as file:
            json.dump(order, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path / "job.json")

    def _terms(self) -> Mapping[str, Any] | None:
        """Return the terms of the order that is there, none of them if it cannot be read; None if there is no order."""
        try:
            return _terms_of(json.loads((self.path / "job.json").read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError):
            return {}

    def forget_result(self) -> None:
        """Remove what the job came to, so that it comes to it again, from its last checkpoint."""
        (self.path / RESULT).unlink(missing_ok=True)

    def forget_data(self) -> None:
        """Remove the datasets, so that they are fetched again."""
        shutil.rmtree(self.path / "data", ignore_errors=True)

    def read_result(self) -> JobResult | None:
        """Return what the job came to, None if it has not ended, or left something else there."""
        try:
            content = json.loads((self.path / RESULT).read_text(encoding="utf-8"))
            return JobResult(
                digest=str(content.get("digest", "")),
                evaluation=dict(content.get("evaluation") or {}),
                passed=content["passed"] is True,
                reason=str(content.get("reason") or ""),
                message=str(content.get("message") or ""),
                base=dict(content["base"]) if content.get("base") else None,
            )
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            log.error("%s: its result cannot be read: %s", self.path.name, error)
            return None

    def keep(self, *names: str) -> bool:
        """Remove everything but what has these names, and tell whether anything is left; if not, all is gone.

        Semantics: checkpoints count where there is one at least.
        """
        kept = {self.path / name for name in names}
        if not any((self.path / CHECKPOINTS).glob("step-*")):
            kept.discard(self.path / CHECKPOINTS)
        for path in self.path.iterdir():
            if path in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if not any(self.path.iterdir()):
            self.remove()
            return False
        return True

    def remove(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path)


def _terms_of(order: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: order.get(name) for name in TERMS}
