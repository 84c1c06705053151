"""Carrying an adapter's directory between a base and its pruned copy: from names to a new directory.

What becomes of the tensors is the adapters'. Neither base is loaded unless it is quantized: weights are read for their
fingerprints, and to see that the manifest tells the truth. Runs on the calling thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from motley_adapters.pruned_copies import recover_adapter, restrict_adapter
from motley_bases.checkpoint import resolve_base
from motley_bases.prune_manifest import PruneManifest, read_prune_manifest
from motley_bases.spec import BaseSpec
from motley_bases.stored_spec import read_spec

from motley_trainer.bases.kept_weights import StoredBase, check_kept_weights
from motley_trainer.files.outputs import new_directory


@dataclass(frozen=True, slots=True)
class Carried:
    """What was written, and the base that it serves on."""

    directory: Path
    digest: str
    base: BaseSpec


def restrict_directory(adapter: Path, original: str, pruned: str, out: Path) -> Carried:
    """Cut an adapter of the original down to the copy.

    Semantics: both bases are as `--base` says them.
    Effects: writes `out`, whole or not at all.
    Raises: OutputError; BaseError for a base or manifest that cannot be used; UnsuitableBaseError as
    `check_kept_weights` does; AdapterError as `restrict_adapter` does.
    """
    with new_directory(out) as aside:
        manifest, whole, copy = _read(original, pruned)
        digest = restrict_adapter(adapter, aside, manifest, original=whole, pruned=copy)
    return Carried(out, digest, copy)


def recover_directory(adapter: Path, original: str, pruned: str, out: Path) -> Carried:
    """Scatter a LoRA of the copy to the original's shapes.

    Semantics: both bases are as `--base` says them.
    Effects: writes `out`, whole or not at all.
    Raises: OutputError; BaseError for a base or manifest that cannot be used; UnsuitableBaseError as
    `check_kept_weights` does; AdapterError as `recover_adapter` does.
    """
    with new_directory(out) as aside:
        manifest, whole, copy = _read(original, pruned)
        digest = recover_adapter(adapter, aside, manifest, original=whole, pruned=copy)
    return Carried(out, digest, whole)


def _read(original: str, pruned: str) -> tuple[PruneManifest, BaseSpec, BaseSpec]:
    whole, copy = resolve_base(original), resolve_base(pruned)
    manifest, whole_spec, copy_spec = read_prune_manifest(copy), read_spec(whole), read_spec(copy)
    check_kept_weights(manifest, StoredBase(whole, whole_spec), StoredBase(copy, copy_spec))
    return manifest, whole_spec, copy_spec
