"""Adapters carried between a base and its pruned copy: a LoRA of the copy recovered, one of the original restricted.

What was kept is the prune manifest's to say. Only what lies on pruned Linears changes; ranks and scales never do. LoRA
goes both ways, as PEFT's files; S2FT is restricted alone. Reading and writing block; any thread but the event loop's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from motley_bases.kept_channels import kept_by_path
from motley_bases.prune_manifest import PruneManifest
from motley_bases.pruned_geometry import KeptChannels
from motley_bases.spec import BaseSpec
from safetensors.torch import load_file, save_file

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import CONFIG_FILE, TENSOR_FILE, show
from motley_adapters.kinds import goat, lora, loram, s2ft
from motley_adapters.kinds.content import KindSource
from motley_adapters.kinds.loram_recovery import recover, restrict
from motley_adapters.kinds.s2ft_restriction import restrict_block
from motley_adapters.manifest import Manifest, read_manifest, write_manifest
from motley_adapters.peft_files import LoraPair
from motley_adapters.reader import inspect_adapter
from motley_adapters.spec import UNDECLARED, AdapterSpec

Change = Callable[[str, LoraPair, KeptChannels], LoraPair]

WHOLE = KeptChannels()
NOT_RESTRICTED = MappingProxyType(
    {
        goat.KIND: "its residual and its router belong to the original's weights",
        loram.KIND: "it was trained on a pruned copy already: serve there the LoRA that it was recovered from",
    }
)


def recover_adapter(
    trained: Path, directory: Path, manifest: PruneManifest, *, original: BaseSpec, pruned: BaseSpec
) -> str:
    """Scatter a LoRA of a pruned copy to the original, zeros where channels were pruned, and return its digest.

    Semantics: what is written is of the kind `loram`: trained on the copy, served on the original. The manifest lies
    beside it, for whoever trains on a copy that is cut alike.
    Raises: UnreadableBaseError for another base's manifest; AdapterMismatchError with reason BASE_MISMATCH for another
    copy's, and for an adapter that was trained on the original and restricted; AdapterFormatError with reason
    UNSUPPORTED_KIND if it is no LoRA; otherwise as `read_adapter` does over `trained`.
    """
    kept = _kept(manifest, original, pruned)
    spec = inspect_adapter(trained, pruned).spec
    if spec.kind != lora.KIND:
        raise _unsupported(spec.kind, "recovered from a pruned copy", f"only {lora.KIND} is")
    if spec.trained_on not in (UNDECLARED, pruned.fingerprint):
        message = f"motley_manifest.trained_on is {spec.trained_on}: it was restricted to the copy, not trained there"
        raise AdapterMismatchError(message, reason="BASE_MISMATCH", field="motley_manifest.trained_on")
    _write_changed(trained, directory, kept, lambda path, pair, of: recover(pair, of, *original.linears[path]))
    return loram.write_loram_manifest(
        directory,
        original,
        trained_on=pruned.fingerprint,
        prune_manifest=loram.write_cut(directory, manifest),
        provenance={"recovered_from": spec.digest, **_declared_by(spec)},
    )


def restrict_adapter(
    adapter: Path, directory: Path, manifest: PruneManifest, *, original: BaseSpec, pruned: BaseSpec
) -> str:
    """Cut a LoRA or S2FT of the original down to a pruned copy, and return its digest.

    Semantics: its delta is the original's on the channels that were kept, exactly; whether it still does there what it
    was trained for is another matter, so it goes on declaring what it was trained on. A Linear all of whose S2FT
    channels were pruned is left out.
    Raises: as `recover_adapter` does, over an adapter of the original; UNSUPPORTED_KIND if it is neither;
    AdapterMismatchError with reason NOTHING_KEPT if every channel that it changes was pruned.
    """
    kept = _kept(manifest, original, pruned)
    spec = inspect_adapter(adapter, original).spec
    provenance = {"restricted_from": spec.digest, "prune_manifest": manifest.digest, **_declared_by(spec)}
    if spec.kind == lora.KIND:
        return _restrict_lora(adapter, directory, kept, original, pruned, provenance)
    if spec.kind == s2ft.KIND:
        return _restrict_s2ft(adapter, directory, kept, original, pruned, provenance)
    raise _unsupported(spec.kind, "restricted to a pruned copy", NOT_RESTRICTED[spec.kind])


def _declared_by(spec: AdapterSpec) -> Mapping[str, str]:
    """Say whose word it is what an adapter was trained on: its own, or that of whoever carries it to another base."""
    return {"declared_by": "operator" if spec.trained_on == UNDECLARED else "adapter"}


def _kept(manifest: PruneManifest, original: BaseSpec, pruned: BaseSpec) -> Mapping[str, KeptChannels]:
    """Hold the manifest against both bases, and spell out what it keeps."""
    kept = kept_by_path(manifest, original)
    if manifest.pruned_fingerprint != pruned.fingerprint:
        message = f"the prune manifest is of {manifest.pruned_fingerprint}, but {pruned.name} is {pruned.fingerprint}"
        raise AdapterMismatchError(message, reason="BASE_MISMATCH", field="prune_manifest.pruned_fingerprint")
    return kept


def _restrict_lora(
    adapter: Path,
    directory: Path,
    kept: Mapping[str, KeptChannels],
    original: BaseSpec,
    pruned: BaseSpec,
    provenance: Mapping[str, object],
) -> str:
    _write_changed(adapter, directory, kept, lambda path, pair, of: restrict(pair, of))
    digest = inspect_adapter(directory, pruned).spec.digest
    write_manifest(directory, Manifest(lora.KIND, original.fingerprint, pruned.fingerprint, digest), {}, provenance)
    return digest


def _restrict_s2ft(
    adapter: Path,
    directory: Path,
    kept: Mapping[str, KeptChannels],
    original: BaseSpec,
    pruned: BaseSpec,
    provenance: Mapping[str, object],
) -> str:
    details = read_manifest(adapter, (s2ft.KIND,), s2ft.KIND).details
    blocks = s2ft.read_blocks(KindSource(adapter, original, manifest_details=details))
    parts = {path: restrict_block(block, kept.get(path, WHOLE)) for path, block in blocks.items()}
    left = {path: block for path, block in parts.items() if block is not None}
    if not left:
        message = f"every channel that the adapter changes was pruned from {pruned.name}"
        raise AdapterMismatchError(message, reason="NOTHING_KEPT", field="motley_manifest.s2ft.modules")
    s2ft.write_s2ft(directory, pruned, left, dtype=None, trained_on=original.fingerprint, provenance=provenance)
    return inspect_adapter(directory, pruned).spec.digest


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


def _unsupported(kind: str, what: str, why: str) -> AdapterFormatError:
    message = f"an adapter of kind {show(kind)} cannot be {what}: {why}"
    return AdapterFormatError(message, reason="UNSUPPORTED_KIND", field="motley_manifest.kind")
