"""Checkpoints: all that a training needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint is a folder that appears whole, with the digest of its tensors and of its own text in it. One that does not
hold what it says is passed over for the one before. Which training it belongs to is written in it too. Owns the files;
what the tensors mean is the loop's. Runs on the calling thread.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from motley_trainer.errors import CheckpointError
from motley_trainer.files.durable import sweep, write_folder
from motley_trainer.spec.reading import digest_of

FORMAT = 1
NUM_KEPT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"

_NAME = re.compile(r"step-([0-9]{1,12})")


@dataclass(frozen=True, eq=False, slots=True)
class Checkpoint:
    """A training after a step.

    Semantics: `loss` is that step's; tensors are on the CPU, by names that the loop chose.
    """

    step: int
    loss: float
    tensors: Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one job, in a folder of their own.

    Semantics: `binding` is what makes it this training and no other: the digest of its base, of its data, of its spec.
    """

    def __init__(self, folder: Path, binding: Mapping[str, str]) -> None:
        self._folder = folder
        self._binding = dict(binding)

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and the one before it.

        Raises: OutputError with reason DISK_FULL or OUTPUT_UNWRITABLE; what was kept before is then still there.
        """

        def fill(folder: Path) -> None:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            save_file(tensors, folder / TENSORS)
            state = {
                "format": FORMAT,
                "step": checkpoint.step,
                "loss": checkpoint.loss.hex(),
                "binding": self._binding,
                "sha256": {TENSORS: _digest_file(folder / TENSORS)},
            }
            text = json.dumps({"state": state, "digest": digest_of(state)}, indent=2)
            (folder / STATE).write_text(f"{text}\n", encoding="utf-8")

        write_folder(self._folder / f"step-{checkpoint.step}", fill)
        for _, path in self._found()[NUM_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole, None if there is none.

        Raises: CheckpointError with reason CHECKPOINT_OF_ANOTHER, naming what of the training is another.
        """
        sweep(self._folder)
        for step, path in self._found():
            checkpoint = self._read(step, path)
            if checkpoint is not None:
                return checkpoint
        return None

    def drop(self) -> None:
        """Remove all checkpoints."""
        for _, path in self._found():
            shutil.rmtree(path)

    def _found(self) -> list[tuple[int, Path]]:
        """Return the checkpoints by their steps, newest first."""
        matches = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob("step-*"))
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def _read(self, step: int, path: Path) -> Checkpoint | None:
        """Return a checkpoint, None if it is not what it was when it was written."""
        try:
            content = json.loads((path / STATE).read_bytes())
            state = content["state"]
            is_whole = content["digest"] == digest_of(state) and state["step"] == step and state["format"] == FORMAT
            if not is_whole or state["sha256"] != {TENSORS: _digest_file(path / TENSORS)}:
                return None
            self._check(path, state["binding"])
            return Checkpoint(step, float.fromhex(state["loss"]), load_file(path / TENSORS))
        except CheckpointError:
            raise
        except (OSError, ValueError, TypeError, KeyError, SafetensorError):
            return None

    def _check(self, path: Path, binding: Mapping[str, str]) -> None:
        for name, wanted in self._binding.items():
            if binding.get(name) != wanted:
                message = f"{path.name} is of a training with another {name}: {binding.get(name)}, not {wanted}"
                raise CheckpointError(message, reason="CHECKPOINT_OF_ANOTHER", field=name)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
