"""Files and folders that are there whole or not at all, whenever the process or the machine stops.

What is written is written aside, made safe file by file, and renamed into its place; a folder that was half written has
a name that nobody reads. Runs on the calling thread.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from motley_trainer.errors import OutputError

ASIDE = ".new-"

_OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


@contextmanager
def told_as_output_error(target: Path) -> Iterator[None]:
    """Turn what a disk refuses into an OutputError, reason DISK_FULL or OUTPUT_UNWRITABLE."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = "DISK_FULL" if _number(error) in (errno.ENOSPC, errno.EDQUOT) else "OUTPUT_UNWRITABLE"
        raise OutputError(f"{target.name} cannot be written: {error}", reason=reason, field=target.name) from error


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have a folder filled, and put it in the place of `target`, which is there whole or as it was.

    Effects: a folder that was at `target` is gone. What cannot be finished leaves nothing behind; what was interrupted
    leaves a folder whose name begins with `.new-`, for `sweep`.
    Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    try:
        with told_as_output_error(target):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            fill(aside)
            for path in sorted(aside.iterdir()):
                _make_safe(path)
            _make_safe(aside)
            # A name that is taken by a folder cannot be given to another in one step. What is there is worth less than
            # what comes: a folder is only written again when it could not be read.
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
            _make_safe(target.parent)
    except OutputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def rename_folder(source: Path, target: Path) -> bool:
    """Put a folder to where nothing is, by one rename, and return False if that is on another file system.

    Raises: OSError.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
        raise
    _make_safe(target.parent)
    _make_safe(source.parent)
    return True


def copy_folder(source: Path, target: Path, check: Callable[[], None]) -> None:
    """Copy a folder of files to where nothing is, and make it safe.

    Semantics: `check` is called before each file, and ends the copying by raising.
    Effects: what cannot be finished leaves nothing behind.
    Raises: OSError, and what `check` raises.
    """
    try:
        target.mkdir()
        for path in sorted(source.iterdir()):
            check()
            shutil.copyfile(path, target / path.name)
            _make_safe(target / path.name)
        _make_safe(target)
    except Exception:
        shutil.rmtree(target, ignore_errors=True)
        raise


def write_json(target: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file that is there whole or as it was.

    Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE.
    """
    aside = target.with_name(f"{ASIDE}{target.name}")
    with told_as_output_error(target):
        aside.write_text(f"{json.dumps(value, indent=2, allow_nan=False)}\n", encoding="utf-8")
        _make_safe(aside)
        os.replace(aside, target)
        _make_safe(target.parent)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left in a folder."""
    for path in folder.glob(f"{ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _number(error: Exception) -> int | None:
    """Return an error's number; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _make_safe(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
