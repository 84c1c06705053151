"""Where a worker keeps the bases that jobs have made: each under its job's id, whole or not at all.

Owns the way of a base from its job's directory to there, which may be cut at any moment and is then gone again. Knows
nothing of servers and processes. Everything blocks; whoever must not, runs it on a thread.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from motley_trainer.errors import SettingsError
from motley_trainer.files.durable import ASIDE, move_folder

MANIFEST_FILE = "loqt_manifest.json"

log = logging.getLogger(__name__)


class MadeBases:
    """Keep bases in a directory.

    Semantics: several workers may have one directory, since a job is in the hands of one worker at a time.
    Raises: SettingsError with reason BASES_DIR if it cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self._lock = Lock()  # of a lease that was lost, the work may still go on when the next one begins
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

    def take(self, made: Path, job_id: str, fingerprint: str) -> Path:
        """Have a job's base here, from where its process has put it unless it is here, and return its place.

        Semantics: can be done again after it was cut, whenever that was.
        Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE; FileNotFoundError if the base is nowhere.
        """
        target = self.directory / job_id
        with self._lock:
            if not is_base(target, fingerprint):
                if not is_base(made, fingerprint):
                    raise FileNotFoundError(f"the base that {job_id} has made is not in {made}")
                move_folder(made, target)
        return target

    def forget_old(self, keep_seconds: float) -> None:
        """Remove what was cut and never gone on with; bases stay."""
        for path in self.directory.glob(f"{ASIDE}*"):
            try:
                if time.time() - path.stat().st_mtime > keep_seconds:
                    shutil.rmtree(path)
                    log.info("%s: forgotten, nobody came back to it", path)
            except OSError as error:
                log.warning("%s: it should be forgotten, but stays: %s", path, error)


def is_base(directory: Path, fingerprint: str) -> bool:
    """Tell whether a directory has the base of this fingerprint, by its manifest, which is never there alone."""
    try:
        manifest: Mapping[str, Any] = json.loads((directory / MANIFEST_FILE).read_bytes())
        return bool(manifest["fingerprint"] == fingerprint)
    except (OSError, ValueError, TypeError, KeyError):
        return False
