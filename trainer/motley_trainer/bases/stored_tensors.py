"""Single tensors of a checkpoint, read when they are asked for, by the names that the loaded model gives them.

Knows no model, and holds no tensor. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from motley_bases.checkpoint import weight_files
from safetensors import safe_open
from torch import Tensor

HEAD = "lm_head.weight"


class StoredTensors:
    """The tensors of a checkpoint.

    Semantics: a decoder that was saved without its head leaves out the `model.` before its names; they are the same. A
    head that is tied to the embedding is not there, stored or not.
    """

    def __init__(self, directory: Path, *, tied_embeddings: bool) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        for path in weight_files(directory):
            with safe_open(path, "pt") as file:
                self._places |= {_whole_name(name): (path, name) for name in file.keys()}  # noqa: SIM118
        if tied_embeddings:
            self._places.pop(HEAD, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without reading it."""
        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        path, stored = self._places[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor


def _whole_name(name: str) -> str:
    return name if name == HEAD or name.startswith("model.") else f"model.{name}"
