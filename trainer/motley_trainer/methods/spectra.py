"""Slices of weights' spectra, kept over jobs: what was taken once of a weight is not taken again, to the bit.

A file has the name of what it was made of, the very numbers of the weight and the directions that were asked for, so
that it is right for every job that finds it, whatever its base, quantization, dtype or scale. Nothing depends on it: a
file that is broken or cannot be written costs the time alone. Several jobs may keep them in one directory. Runs on the
thread that owns the model.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from motley_adapters.kinds.goat_init import SpectrumSlices, take_directions
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_BYTES = 4 << 30  # of all files; those that nobody has read for longest go

_NAMES = ("left", "singular_values", "right")
_DIGEST = "sha256"

log = logging.getLogger(__name__)


class Spectra:
    """What is kept in a directory, made when it is needed; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def slices(self, weight: Tensor, directions: Tensor) -> SpectrumSlices:
        """Return singular directions of a weight, as they were kept, or decompose it and keep them.

        Shapes: weight [O, I] float32, directions [E, R / E] int64.
        """
        if self._folder is None:
            return take_directions(weight, directions)
        path = self._folder / f"{_digest({'weight': weight.T, 'directions': directions})}.safetensors"
        found = _read(path)
        if found is None:
            taken = take_directions(weight, directions)
            found = {name: getattr(taken, name).cpu().contiguous() for name in _NAMES}
            self._keep(path, found)
        return SpectrumSlices(*(found[name] for name in _NAMES))

    def _keep(self, path: Path, tensors: dict[str, Tensor]) -> None:
        aside = path.with_name(f".new-{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_file(tensors, aside, {_DIGEST: _digest(tensors)})
            os.replace(aside, path)
            _drop_oldest(path.parent)
        except (OSError, SafetensorError) as error:
            log.warning("a spectrum cannot be kept, and is taken again when it is needed: %s", error)
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return what a file has, None if there is none or it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            told = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in _NAMES}
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        log.warning("%s is broken: %s", path, error)
        return None
    if told != _digest(tensors):
        log.warning("%s is broken: its content is not what was written", path)
        return None
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of tensors, their names and shapes."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _drop_oldest(folder: Path) -> None:
    """Remove what nobody has read for longest, until what is left is few enough bytes."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another job has removed it
            facts = path.stat()
            found.append((facts.st_mtime, facts.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
