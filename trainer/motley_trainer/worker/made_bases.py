"""Where a worker keeps the bases that jobs have made: each under its job's id, whole or not at all.

Owns the way of a base from its job's directory to there, which may be cut at any moment and is then gone again. What is
there is never replaced. Knows nothing of servers and processes. Everything blocks; whoever must not, runs it on a
thread.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from motley_trainer.errors import OutputError, SettingsError
from motley_trainer.files.durable import ASIDE, copy_folder, rename_folder, told_as_output_error
from motley_trainer.files.loqt_manifest import MANIFEST_FILE

LOCK_FILE = ".lock"
BASE_EXISTS = "BASE_EXISTS"

log = logging.getLogger(__name__)


class NotWantedError(Exception):
    """Say that a base was not put to the others, since nobody wants it there any more."""


class MadeBases:
    """Keep bases in a directory.

    Semantics: several workers may have one directory. A lease that was lost may still be at work when the next one is
    done, so each copies under a name of its own, and puts what it has into its place while it holds the lock.
    Raises: SettingsError with reason BASES_DIR if it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # they know what tenants' data says
            problem = "" if os.access(self.directory, os.W_OK | os.X_OK) else "it cannot be written to"
        except OSError as error:
            problem = str(error)
        if problem:
            raise SettingsError(f"{directory} cannot be used: {problem}", reason="BASES_DIR", field="bases")

    def has(self, job_id: str, fingerprint: str) -> bool:
        """Tell whether a job's base is there."""
        return is_base(self.directory / job_id, fingerprint)

    def take(self, made: Path, job_id: str, fingerprint: str, is_unwanted: Callable[[], bool] = lambda: False) -> Path:
        """Have a job's base here, from where its process has put it unless it is here, and return its place.

        Semantics: can be done again after it was cut, whenever that was. `is_unwanted` is asked on the way; once it is
        in its place it stays.
        Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE, or BASE_EXISTS if something else is in its
        place; NotWantedError; FileNotFoundError if the base is nowhere.
        """
        target = self.directory / job_id
        if _is_there(target, fingerprint):
            return target
        if not is_base(made, fingerprint):
            raise FileNotFoundError(f"the base that {job_id} has made is not in {made}")

        def check() -> None:
            if is_unwanted():
                raise NotWantedError(f"{made} is not wanted any more")

        with told_as_output_error(target):
            if not self._put(made, target, fingerprint, check):
                aside = self.directory / f"{ASIDE}{job_id}-{os.getpid()}-{secrets.token_hex(8)}"
                copy_folder(made, aside, check)
                try:
                    self._put(aside, target, fingerprint, check)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        return target

    def _put(self, source: Path, target: Path, fingerprint: str, check: Callable[[], None]) -> bool:
        """Rename a base into its place unless it is there, and return False if it is on another file system."""
        with (self.directory / LOCK_FILE).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed; a rename does not keep the others waiting
            if _is_there(target, fingerprint):
                return True
            check()
            return rename_folder(source, target)

    def forget_old(self, keep_seconds: float) -> None:
        """Remove what was cut and never gone on with; bases stay."""
        for path in self.directory.glob(f"{ASIDE}*"):
            try:
                # One large file may be long on its way, while nothing is new in its folder.
                newest = max(one.stat().st_mtime for one in (path, *path.iterdir()))
                if time.time() - newest > keep_seconds:
                    shutil.rmtree(path)
                    log.info("%s: forgotten, nobody came back to it", path)
            except OSError as error:
                log.warning("%s: it should be forgotten, but stays: %s", path, error)


def _is_there(target: Path, fingerprint: str) -> bool:
    """Tell whether a base is in its place.

    Raises: OutputError with reason BASE_EXISTS if something else is: whatever that is, somebody may have been told of.
    """
    if is_base(target, fingerprint):
        return True
    if os.path.lexists(target):
        message = f"{target.name} is in the worker's `--bases` already, is not {fingerprint}, and is never replaced"
        raise OutputError(message, reason=BASE_EXISTS, field="bases")
    return False


def is_base(directory: Path, fingerprint: str) -> bool:
    """Tell whether a directory has the base of this fingerprint, by its manifest, which is never there alone."""
    try:
        manifest: Mapping[str, Any] = json.loads((directory / MANIFEST_FILE).read_bytes())
        return bool(manifest["fingerprint"] == fingerprint)
    except (OSError, ValueError, TypeError, KeyError):
        return False
