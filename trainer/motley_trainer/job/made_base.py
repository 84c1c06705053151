"""A base that a job has made: its directory, which can be served as it is, and the manifest that tells its origin.

Owns the files. What is in the weights is not known here. Runs on the thread that trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motley_bases.loader import read_parsed_config, stored_dtype
from motley_bases.prune_manifest import read_prune_manifest
from motley_bases.pruned import is_pruned
from torch import nn
from transformers import PreTrainedModel

from motley_trainer.errors import DivergedError
from motley_trainer.files.durable import write_folder
from motley_trainer.files.loqt_manifest import MANIFEST_FILE, SCHEMA_VERSION, read_loqt_manifest
from motley_trainer.job.stages import STAGE_FILE, Stage
from motley_trainer.pruning.dense_copy import write_dense
from motley_trainer.pruning.written import write_pruned


@dataclass(frozen=True, slots=True)
class TrainedBase:
    """The wire's TrainedBase; `original_fingerprint` is None for one from scratch."""

    directory: str
    fingerprint: str
    original_fingerprint: str | None
    num_merges: int
    size_bytes: int


def write_weights(directory: Path, model: PreTrainedModel, *, original: Path) -> str:
    """Fill a directory with a base of another's kind, in the dtype that that is stored in, and return its fingerprint.

    Raises: DivergedError with reason LOSS_NOT_FINITE for a weight that this dtype has no number for.
    """
    config = read_parsed_config(original)
    dtype = stored_dtype(original, config)
    nn.Module.to(model, dtype)
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            message = f"training diverged: in {dtype}, {name} has values that are not finite"
            raise DivergedError(message, reason="LOSS_NOT_FINITE", field="optimizer.learning_rate")
    if is_pruned(config):
        manifest = read_prune_manifest(original)
        return write_pruned(directory, model, original=original, config=config, dtype=dtype, manifest=manifest)
    return write_dense(directory, model, original=original, dtype=dtype)


def keep_base(
    target: Path,
    trained: Stage,
    *,
    chain: Sequence[str],
    merges: Sequence[Mapping[str, object]],
    provenance: Mapping[str, object],
) -> TrainedBase:
    """Move what a stage left to where it is looked for, with its manifest beside.

    Semantics: `chain` are the fingerprints of what it came from, its original's last; none for one from scratch.
    Effects: `target` is there whole or not at all; interrupted, neither it nor the stage may be, and the stage is done
    again from its checkpoint.
    """

    def fill(aside: Path) -> None:
        (trained.directory / STAGE_FILE).unlink()  # first: what is not whole any more must not be found
        for path in sorted(trained.directory.iterdir()):
            os.replace(path, aside / path.name)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": trained.facts["fingerprint"],
            "original_fingerprint": chain[-1] if chain else None,
            "chain": list(chain),
            "merges": list(merges),
            **provenance,
        }
        (aside / MANIFEST_FILE).write_text(f"{json.dumps(manifest, indent=2, allow_nan=False)}\n", encoding="utf-8")

    write_folder(target, fill)
    found = read_trained_base(target)
    assert found is not None
    return found


def chain_of(directory: Path, fingerprint: str) -> tuple[str, ...]:
    """Return the chain of what is made of a base of this fingerprint: what that came from, and itself.

    Semantics: a manifest of other weights than those beside it says nothing of them.
    Raises: as `read_loqt_manifest` does.
    """
    manifest = read_loqt_manifest(directory)
    before = manifest.chain if manifest is not None and manifest.fingerprint == fingerprint else ()
    return (*before, fingerprint)


def read_trained_base(directory: Path) -> TrainedBase | None:
    """Return what a directory's manifest tells of the base in it, None if there is none.

    Raises: as `read_loqt_manifest` does.
    """
    manifest = read_loqt_manifest(directory)
    if manifest is None:
        return None
    return TrainedBase(
        directory=str(directory.absolute()),
        fingerprint=manifest.fingerprint,
        original_fingerprint=manifest.original_fingerprint,
        num_merges=manifest.num_merges,
        size_bytes=sum(path.stat().st_size for path in directory.iterdir()),
    )
