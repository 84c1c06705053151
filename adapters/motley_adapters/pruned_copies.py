"""Adapters carried between a base and its pruned copy: a LoRA of the copy recovered, one of the original restricted.

Both are LoRA directories as PEFT loads them; only factors of pruned Linears change, ranks and scales never do. What was
kept is the prune manifest's to say. Reading and writing block; any thread but the event loop's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from motley_bases.kept_channels import kept_by_path
from motley_bases.prune_manifest import PruneManifest
from motley_bases.pruned_geometry import KeptChannels
from motley_bases.spec import BaseSpec
from safetensors.torch import load_file, save_file

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import CONFIG_FILE, TENSOR_FILE, show
from motley_adapters.kinds import lora
from motley_adapters.kinds.loram import write_loram_manifest
from motley_adapters.kinds.loram_recovery import recover, restrict
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.peft_files import LoraPair
from motley_adapters.reader import inspect_adapter

Change = Callable[[str, LoraPair, KeptChannels], LoraPair]


def recover_adapter(
    trained: Path, directory: Path, manifest: PruneManifest, *, original: BaseSpec, pruned: BaseSpec
) -> str:
    """Scatter a LoRA of a pruned copy to the original, zeros where channels were pruned, and return its digest.

    Semantics: what is written is of the kind `loram`: trained on the copy, served on the original.
    Raises: as `read_adapter` does over `trained`; AdapterFormatError with reason UNSUPPORTED_KIND if it is no LoRA;
    AdapterMismatchError with reason BASE_MISMATCH for another copy's manifest; UnreadableBaseError for another base's.
    """
    digest = _check(trained, manifest, base=pruned, pruned=pruned)
    kept = kept_by_path(manifest, original)
    _write_changed(trained, directory, kept, lambda path, pair, of: recover(pair, of, *original.linears[path]))
    return write_loram_manifest(
        directory,
        original,
        trained_on=pruned.fingerprint,
        prune_manifest=manifest.digest,
        provenance={"recovered_from": digest},
    )


def restrict_adapter(
    adapter: Path, directory: Path, manifest: PruneManifest, *, original: BaseSpec, pruned: BaseSpec
) -> str:
    """Cut a LoRA of the original down to a pruned copy, and return its digest.

    Semantics: its delta is the original's on the channels that were kept, exactly; whether it still does there what it
    was trained for is another matter, so it goes on declaring what it was trained on.
    Raises: as `recover_adapter` does, over an adapter of the original.
    """
    digest = _check(adapter, manifest, base=original, pruned=pruned)
    kept = kept_by_path(manifest, original)
    _write_changed(adapter, directory, kept, lambda path, pair, of: restrict(pair, of))
    restricted = inspect_adapter(directory, pruned).spec.digest
    declared = Manifest(lora.KIND, original.fingerprint, pruned.fingerprint, restricted)
    write_manifest(directory, declared, {}, {"restricted_from": digest, "prune_manifest": manifest.digest})
    return restricted


def _check(adapter: Path, manifest: PruneManifest, *, base: BaseSpec, pruned: BaseSpec) -> str:
    """Check an adapter against its own base, and the manifest against the copy; return the adapter's digest."""
    spec = inspect_adapter(adapter, base).spec
    if spec.kind != lora.KIND:
        message = f"an adapter of kind {show(spec.kind)} cannot be carried to or from a pruned copy; {lora.KIND} can"
        raise AdapterFormatError(message, reason="UNSUPPORTED_KIND", field="motley_manifest.kind")
    if manifest.pruned_fingerprint != pruned.fingerprint:
        message = f"the prune manifest is of {manifest.pruned_fingerprint}, but {pruned.name} is {pruned.fingerprint}"
        raise AdapterMismatchError(message, reason="BASE_MISMATCH", field="prune_manifest.pruned_fingerprint")
    return spec.digest


def _write_changed(source: Path, directory: Path, kept: Mapping[str, KeptChannels], change: Change) -> None:
    """Write a LoRA directory with the factors of some Linears changed, and all else as it is."""
    tensors = load_file(source / TENSOR_FILE)
    for key_of_a in [key for key in tensors if key.endswith(".lora_A.weight")]:
        path = key_of_a.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if (of := kept.get(path)) is not None:
            key_of_b = key_of_a.replace(".lora_A.", ".lora_B.")
            changed = change(path, LoraPair(tensors[key_of_a], tensors[key_of_b]), of)
            tensors |= {key_of_a: changed.a.contiguous(), key_of_b: changed.b.contiguous()}
    config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None  # it named the base that this one is no longer for
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / TENSOR_FILE, {"format": "pt"})
    (directory / CONFIG_FILE).write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
