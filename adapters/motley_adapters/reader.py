"""The one door: a directory becomes an adapter that is sound and fits the base.

Uploads, adapters named at start-up and what comes back from the blob store all pass here, so nothing is served that was
checked less: whether the tensors are kept or only looked at, the checks are the same code. It owns their order and the
choice of the kind. Reads files and computes for a while; any thread but the event loop's and the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit

from motley_adapters.formats import FileReader, map_file, read_file
from motley_adapters.identity import adapter_digest
from motley_adapters.kinds import goat, lora, loram, s2ft
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.manifest import check_base, check_digest, read_manifest
from motley_adapters.outline import Outline, UnitOutline, outline_of
from motley_adapters.spec import Adapter, AdapterSpec, BaseTensor, Part

KindReader = Callable[[KindSource], KindContent]

KIND_READERS: Mapping[str, KindReader] = MappingProxyType(
    {
        lora.KIND: lora.read_lora,
        s2ft.KIND: s2ft.read_s2ft,
        goat.KIND: goat.read_goat,
        loram.KIND: loram.read_loram,
    }
)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of an adapter that was checked and not kept."""

    spec: AdapterSpec
    outline: Outline


def read_adapter(
    directory: Path, base: BaseSpec, *, base_tensor: BaseTensor | None = None, residuals: Path | None = None
) -> Adapter:
    """Read an adapter's directory, check everything, and return it in host memory.

    Semantics: `base_tensor` is asked for the weight of the embedding or of lm_head, and only when the files hold a
    copy of one: equal, it is ignored; different, or with nothing to compare it to, the adapter is refused. `residuals`
    is a folder with GOAT residuals by digest, `DIGITS.safetensors`, for adapters that do not hold their own.
    Shapes: as in `Adapter`; float32, channels int32, contiguous, on the CPU.
    Raises: AdapterFormatError for what is wrong with the files; AdapterMismatchError for what does not fit this
    base. Nothing else, whatever the files hold.
    """
    spec, parts = _check(directory, base, base_tensor, residuals, read_file)
    own, *shared = (Part(part.digest, {path: _owned(unit) for path, unit in part.units.items()}) for part in parts)
    return Adapter(spec, own.units, tuple(shared))


def inspect_adapter(
    directory: Path, base: BaseSpec, *, base_tensor: BaseTensor | None = None, residuals: Path | None = None
) -> Inspection:
    """Check everything that `read_adapter` does, and keep nothing but facts.

    Effects: memory of this process's own grows by a few tensors at a time, not by the adapter; the files are mapped, so
    nobody else may write to the directory meanwhile (see `map_file`).
    Raises: as `read_adapter`, for the same files the same.
    """
    spec, parts = _check(directory, base, base_tensor, residuals, map_file)
    return Inspection(spec, outline_of(parts))


def _check(
    directory: Path, base: BaseSpec, base_tensor: BaseTensor | None, residuals: Path | None, read: FileReader
) -> tuple[AdapterSpec, tuple[Part, ...]]:
    """Do all checks in their order; the parts have their tensors as `KindContent` has them."""
    manifest = read_manifest(directory, KIND_READERS, default_kind=lora.KIND)
    check_base(manifest, base)
    content = KIND_READERS[manifest.kind](KindSource(directory, base, base_tensor, residuals, manifest.details, read))
    shared = tuple(part.digest for part in content.shared)
    digest = adapter_digest(manifest.kind, content.units, shared)
    check_digest(manifest, digest)
    ranks, scalings, nbytes = {}, {}, 0
    for path, unit in content.units.items():
        ranks[path], scalings[path] = unit.rank, unit.scaling
        nbytes += UnitOutline.of(unit).blank.nbytes
    spec = AdapterSpec(
        digest=digest,
        kind=manifest.kind,
        ranks=ranks,
        scalings=scalings,
        trained_on=manifest.trained_on,
        nbytes=nbytes,
        shared=shared,
        serves_on=manifest.serves_on,
        channels=content.channels,
    )
    return spec, (Part(digest, content.units), *content.shared)


def _owned(unit: DeltaUnit) -> DeltaUnit:
    """Return a unit in memory of its own, a row per rank as the operator reads it."""
    return unit.with_tensors(
        torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else torch.int32).copy_(tensor)
        for tensor in unit.tensors
    )
