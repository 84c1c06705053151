"""The kind `loram`: a LoRA that was trained on a pruned copy of the base and scattered back to the base's shapes.

On disk it is a LoRA as PEFT loads it, zeros where the pruned channels are. The zeros are not multiplied: rows of
lora_B and columns of lora_A that hold nothing else are left out here, and the channels that stay are named. Beside them
may lie the prune manifest of the copy, for whoever would cut another as it was; serving never reads it, but holds it
against its digest. Reading blocks; any thread but the event loop's.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from motley_bases.prune_manifest import PruneManifest
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import CUT_FILE, MAX_CUT_BYTES, has_file
from motley_adapters.identity import adapter_digest
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.kinds.lora import read_peft_units
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.spec import UNDECLARED

KIND = "loram"


def read_loram(source: KindSource) -> KindContent:
    """Read a recovered LoRAM directory, and leave its zeros out.

    Raises: as `read_lora` does; AdapterMismatchError with reason NOT_RECOVERED for factors of the pruned copy's own
    shapes; AdapterFormatError with reason EMPTY_ADAPTER if no module changes anything, and for a prune manifest with
    reason UNEXPECTED_FILE if none is declared, DIGEST_MISMATCH if another is.
    """
    details = source.details(KIND)
    details.allow("recovered", "prune_manifest")
    if not details.flag("recovered"):
        message = f"{details.path}.recovered is false: the factors still fit the pruned base alone"
        raise AdapterMismatchError(message, reason="NOT_RECOVERED", field=f"{details.path}.recovered")
    is_named = "prune_manifest" in details and not details.is_null("prune_manifest")
    _check_cut(source, f"{details.path}.prune_manifest", details.digest("prune_manifest") if is_named else None)
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


def write_cut(directory: Path, manifest: PruneManifest) -> str:
    """Lay the prune manifest of a pruned copy beside an adapter that was trained on it, and return its digest."""
    (directory / CUT_FILE).write_bytes(manifest.content)
    return manifest.digest


class CompactUnits(Mapping[str, DeltaUnit]):
    """Units without the channels that they do not read or change, and without those that change nothing.

    Semantics: each is gathered when it is asked for, since all of them together are as large as the adapter. `whole` is
    left as it is.
    """

    def __init__(self, units: Mapping[str, DeltaUnit], whole: str) -> None:
        self._units = units
        self._used = {path: _used_channels(unit) for path, unit in units.items() if path != whole}
        changing = {path for path, (inputs, outputs) in self._used.items() if inputs.any() and outputs.any()}
        self._paths = tuple(path for path in units if path == whole or path in changing)

    def __getitem__(self, path: str) -> DeltaUnit:
        if path not in self._paths:
            raise KeyError(path)
        unit = self._units[path]
        if path not in self._used:
            return unit
        assert unit.a is not None
        assert unit.b is not None
        used_inputs, used_outputs = self._used[path]
        a, inputs = _columns(unit.a, used_inputs)
        b, outputs = _columns(unit.b, used_outputs)
        return DeltaUnit(a, b, unit.scaling, inputs, outputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _check_cut(source: KindSource, field: str, declared: str | None) -> None:
    if not has_file(source.directory, CUT_FILE):
        return
    if declared is None:
        message = f"{CUT_FILE} is there, and {field} names none"
        raise AdapterFormatError(message, reason="UNEXPECTED_FILE", field=CUT_FILE)
    found = _digest_of(source.read(source.directory, CUT_FILE, MAX_CUT_BYTES))
    if found != declared:
        message = f"{field} is {declared}, and the bytes of {CUT_FILE} have {found}"
        raise AdapterFormatError(message, reason="DIGEST_MISMATCH", field=field)


def _digest_of(content: bytes | bytearray | mmap.mmap) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _read_compact(source: KindSource) -> CompactUnits:
    # A token's id picks one column of an embedding's factor, so there is nothing to leave out.
    units = CompactUnits(read_peft_units(source), whole=source.base.embedding_path)
    if not units:
        raise AdapterFormatError("every module's delta is zero", reason="EMPTY_ADAPTER", field="lora_B")
    return units


def _used_channels(unit: DeltaUnit) -> tuple[Tensor, Tensor]:
    """Tell of each input and of each output whether any weight on it is not zero."""
    assert unit.a is not None
    assert unit.b is not None
    return _any_in_column(unit.a), _any_in_column(unit.b)


def _any_in_column(factor: Tensor) -> Tensor:
    low, high = factor.aminmax(dim=0)  # unlike any(), it makes no copy
    return (low != 0) | (high != 0)


def _columns(factor: Tensor, used: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a factor's used columns, and which they are; None if that is all of them."""
    if used.all():
        return factor, None
    kept = torch.nonzero(used).flatten()
    return factor[:, kept], kept.to(torch.int32)
