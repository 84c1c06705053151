"""The kind `loram`: a LoRA that was trained on a pruned copy of the base and scattered back to the base's shapes.

On disk it is a LoRA as PEFT loads it, zeros where the pruned channels are. The zeros are not multiplied: rows of
lora_B and columns of lora_A that hold nothing else are left out here, and the channels that stay are named. Reading
blocks; any thread but the event loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.identity import adapter_digest
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.kinds.lora import read_peft_units
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.spec import UNDECLARED

KIND = "loram"


def read_loram(source: KindSource) -> KindContent:
    """Read a recovered LoRAM directory, and leave its zeros out.

    Raises: as `read_lora` does; AdapterMismatchError with reason NOT_RECOVERED for factors of the pruned copy's own
    shapes; AdapterFormatError with reason EMPTY_ADAPTER if no module changes anything.
    """
    details = source.details(KIND)
    details.allow("recovered", "prune_manifest")
    if not details.flag("recovered"):
        message = f"{details.path}.recovered is false: the factors still fit the pruned base alone"
        raise AdapterMismatchError(message, reason="NOT_RECOVERED", field=f"{details.path}.recovered")
    if "prune_manifest" in details and not details.is_null("prune_manifest"):
        details.digest("prune_manifest")
    return KindContent(_read_compact(source))


def write_loram_manifest(
    directory: Path,
    base: BaseSpec,
    *,
    trained_on: str = UNDECLARED,
    prune_manifest: str | None = None,
    provenance: Mapping[str, object] | None = None,
) -> str:
    """Declare a zero-filled PEFT directory to be a recovered LoRAM adapter of a base, and return its digest."""
    digest = adapter_digest(KIND, _read_compact(KindSource(directory, base)))
    details = {"recovered": True, "prune_manifest": prune_manifest}
    write_manifest(directory, Manifest(KIND, trained_on, base.fingerprint, digest), details, provenance)
    return digest


def compact(unit: DeltaUnit) -> DeltaUnit | None:
    """Return a plain unit without the channels that it does not change or read, or None if it changes nothing."""
    assert unit.a is not None
    assert unit.b is not None
    a, inputs = _without_zeros(unit.a)
    b, outputs = _without_zeros(unit.b)
    if not a.numel() or not b.numel():
        return None
    return DeltaUnit(a, b, unit.scaling, inputs, outputs)


def _read_compact(source: KindSource) -> dict[str, DeltaUnit]:
    units = read_peft_units(source)
    # A token's id picks one column of an embedding's factor, so there is nothing to leave out.
    compacted = {p: unit if p == source.base.embedding_path else compact(unit) for p, unit in units.items()}
    kept = {path: unit for path, unit in compacted.items() if unit is not None}
    if not kept:
        raise AdapterFormatError("every module's delta is zero", reason="EMPTY_ADAPTER", field="lora_B")
    return kept


def _without_zeros(factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a factor's columns that are not all zero, and which they are; None if that is all of them."""
    kept = torch.nonzero(factor.any(dim=0)).flatten()
    if len(kept) == factor.shape[1]:
        return factor, None
    return factor[:, kept].contiguous(), kept.to(torch.int32)
