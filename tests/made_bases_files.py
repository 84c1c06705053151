"""Bases without weights, as the jobs of a worker leave them, and directories that are on different file systems."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from motley_trainer.worker.made_bases import LOCK_FILE

FINGERPRINT = f"sha256:{'1' * 64}"
FILES = {
    "config.json": b"{}",
    "loqt_manifest.json": json.dumps({"fingerprint": FINGERPRINT}).encode(),
    "model.safetensors": b"weights" * 1000,
}


def kept_in(directory: Path) -> list[str]:
    """List what lies in a worker's directory of bases."""
    return sorted(name for name in os.listdir(directory) if name != LOCK_FILE)


def content(directory: Path) -> dict[str, bytes]:
    """Return the files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_base(directory: Path, fingerprint: str = FINGERPRINT) -> None:
    directory.mkdir(parents=True)
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
    (directory / "loqt_manifest.json").write_text(json.dumps({"fingerprint": fingerprint}))


def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put folders with different parents on different file systems."""
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
