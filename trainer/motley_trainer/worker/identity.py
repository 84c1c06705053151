"""Who a worker is to the server: the fingerprint of its base, and a name of its own.

Reads the base's files and no model: torch is not loaded here. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from pathlib import Path

from motley_bases.base_record import read_base_record, resolve_fingerprint
from motley_bases.checkpoint import resolve_base
from motley_bases.fingerprint import fingerprint

from motley_trainer.worker.settings import WorkerBase

MAX_HOST_LETTERS = 50

log = logging.getLogger(__name__)


def identify_base(name: str, cache_directory: Path) -> WorkerBase:
    """Find a base and the fingerprint that adapters made for it name; a quantized copy's is its original's.

    Effects: remembers the fingerprints of files in the cache directory.
    Raises: BaseError for what is no readable checkpoint.
    """
    directory = resolve_base(name)
    log.info("reading the fingerprint of base %s", directory)  # which takes a while when it is large, and new here
    found = fingerprint(directory, cache_directory=cache_directory)
    record = read_base_record(directory)
    if record is not None:  # whether it is quantized so is checked by whoever loads it
        found = resolve_fingerprint(directory, found, record.quantization)
    return WorkerBase(directory.absolute(), directory.name, found)


def default_name(work_directory: Path) -> str:
    """Return a name that is the same at each start, and another for another work directory on this machine."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:MAX_HOST_LETTERS] or "worker"
    return f"{host}-{hashlib.sha256(bytes(work_directory.absolute())).hexdigest()[:8]}"
