"""The kind `goat`: experts that each token chooses among at every Linear, beside a residual that adapters share.

The scale stands in the manifest and is never guessed. Training began from slices of the base's singular vectors, whose
mean the residual takes away again; it is a part of its own, named by digest, stored once for all adapters of the
same base and geometry, and never computed here. A routed adapter has no weight that it could be merged into. Reading
blocks; any thread but the event loop's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.types import Gate
from safetensors.torch import save_file
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import (
    MAX_TENSOR_FILE_BYTES,
    RESIDUAL_FILE,
    TENSOR_FILE,
    has_file,
    read_tensor_file,
    refuse_peft_config,
)
from motley_adapters.identity import adapter_digest, part_digest
from motley_adapters.kinds.checks import (
    check_factor,
    check_linear,
    check_products,
    check_shape,
    refuse_others,
    take_tensor,
)
from motley_adapters.kinds.content import KindContent, KindSource
from motley_adapters.manifest import Manifest, write_manifest
from motley_adapters.manifest_object import ManifestObject
from motley_adapters.spec import Part
from motley_adapters.tensor_file import parse_metadata, parse_tensors

KIND = "goat"

Segments = Literal["head", "mini", "principal", "minor", "random"]
RankForScale = Literal["expert", "total"]

_SEGMENTS: tuple[str, ...] = get_args(Segments)
_RANK_SOURCES: tuple[str, ...] = get_args(RankForScale)
_SCALE_TOLERANCE = 1e-3  # relative: a scale may have been written with few digits
_SUFFIXES = (".goat_A", ".goat_B", ".goat_router")
_MAX_RANK = 65536
_SMALLEST, _LARGEST = 1e-30, 1e30  # what float32 still multiplies without loss or overflow
_RANK_SOURCE = "motley_manifest.goat resolves"
_OF_BASE = "motley_base"  # in the metadata of a residual's file: the fingerprint of the base that it was made of


@dataclass(frozen=True, slots=True)
class GoatGeometry:
    """What all modules of an adapter, and all adapters that share its residual, have in common."""

    experts: int
    top_k: int
    rank: int
    rho: float
    segments: Segments

    @property
    def residual_scaling(self) -> float:
        """Return the coefficient of the residual's unscaled factors."""
        return -1.0 / (self.rho * self.experts)

    def theoretical_scale(self, in_features: int, eta: float, rank_for_scale: RankForScale) -> float:
        """Return sqrt(3 * in_features * eta / rank), the rank being one expert's or all experts'."""
        rank = self.rank // self.experts if rank_for_scale == "expert" else self.rank
        return math.sqrt(3.0 * in_features * eta / rank)


@dataclass(frozen=True, eq=False, slots=True)
class GoatModule:
    """One Linear's experts, router and residual.

    Shapes: a [R, I], b [O, R], experts stacked in order along R; router [E, I] float32; residual_a [R, I],
    residual_b [O, R], unscaled.
    """

    a: Tensor
    b: Tensor
    router: Tensor
    scale: float
    residual_a: Tensor
    residual_b: Tensor

    def unit(self, top_k: int) -> DeltaUnit:
        """Return the routed unit, over the same memory."""
        return DeltaUnit(self.a, self.b.T, self.scale, gate=Gate(self.router, top_k))

    def residual_unit(self, scaling: float) -> DeltaUnit:
        """Return the unit of the residual, over the same memory."""
        return DeltaUnit(self.residual_a, self.residual_b.T, scaling)


def read_goat(source: KindSource) -> KindContent:
    """Read a GOAT directory, and its residual from there or from the folder of residuals.

    Raises: AdapterFormatError for files that are malformed or at odds with each other; AdapterMismatchError for
    modules or shapes that are not the base's, or with reason MISSING_RESIDUAL. The field is the tensor's name or the
    manifest's field.
    """
    refuse_peft_config(source.directory, KIND)
    details = source.details(KIND)
    geometry, scales, residual_digest = _read_details(details)
    sides = {path: check_linear(path, source.base, f"{details.path}.scales.{path}", KIND) for path in scales}
    tensors = parse_tensors(read_tensor_file(source.directory, source.read))
    _check_scales(tensors, scales, details)
    _check_theory(geometry, scales, sides, details)
    residuals = _read_residual(source, residual_digest)
    modules = {
        path: _module(path, scales[path], geometry, sides[path], tensors=tensors, residuals=residuals)
        for path in scales
    }
    _check_segments(geometry, sides, details)
    refuse_others(tensors, KIND)
    refuse_others(residuals, f"{KIND}.scales")
    residual = {path: module.residual_unit(geometry.residual_scaling) for path, module in modules.items()}
    actual = part_digest(residual)
    if actual != residual_digest:
        message = f"{details.path}.residual is {residual_digest}, but the residual at hand is {actual}"
        raise AdapterFormatError(message, reason="RESIDUAL_MISMATCH", field=f"{details.path}.residual")
    units = {path: module.unit(geometry.top_k) for path, module in modules.items()}
    for path, unit in units.items():
        check_products(f"{path}.goat_B", unit)
        check_products(f"{path}.residual_B", residual[path])
    return KindContent(units, shared=(Part(actual, residual),))


def write_goat(
    directory: Path,
    base: BaseSpec,
    geometry: GoatGeometry,
    modules: Mapping[str, GoatModule],
    *,
    residuals: Path | None = None,
    dtype: torch.dtype = torch.float32,
    details: Mapping[str, object] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> str:
    """Write a GOAT directory for a base and return the adapter's digest; the manifest comes last.

    Semantics: the residual is stored in float32, beside the adapter or, under its digest, in `residuals`, where one
    that is there already is left alone. `details` may add `eta` and `rank_for_scale`. `dtype` is that of the experts.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ordered = {path: _as_stored(modules[path], dtype) for path in sorted(modules)}
    tensors: dict[str, Tensor] = {}
    residual_tensors: dict[str, Tensor] = {}
    for path, module in ordered.items():
        tensors |= {f"{path}.goat_A": module.a, f"{path}.goat_B": module.b, f"{path}.goat_router": module.router}
        residual_tensors |= {f"{path}.residual_A": module.residual_a, f"{path}.residual_B": module.residual_b}
    residual = part_digest({p: module.residual_unit(geometry.residual_scaling) for p, module in ordered.items()})
    save_file(tensors, directory / TENSOR_FILE)
    file = directory / RESIDUAL_FILE if residuals is None else residuals / _residual_name(residual)
    if residuals is None or not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Under its digest it is that of any base with the same spectra; beside an adapter it is of the adapter's base.
        save_file(residual_tensors, file, {_OF_BASE: base.fingerprint} if residuals is None else None)
    fields = {
        "experts": geometry.experts,
        "top_k": geometry.top_k,
        "rank": geometry.rank,
        "rho": geometry.rho,
        "segments": geometry.segments,
        "scales": {path: module.scale for path, module in ordered.items()},
        "residual": residual,
        **(details or {}),
    }
    digest = adapter_digest(KIND, {p: module.unit(geometry.top_k) for p, module in ordered.items()}, [residual])
    write_manifest(directory, Manifest(KIND, base.fingerprint, base.fingerprint, digest), fields, provenance)
    return digest


def _as_stored(module: GoatModule, dtype: torch.dtype) -> GoatModule:
    a, b = (tensor.detach().to(dtype).contiguous() for tensor in (module.a, module.b))
    router, residual_a, residual_b = (
        tensor.detach().to(torch.float32).contiguous()
        for tensor in (module.router, module.residual_a, module.residual_b)
    )
    return GoatModule(a, b, router, module.scale, residual_a, residual_b)


def _read_details(details: ManifestObject) -> tuple[GoatGeometry, dict[str, float], str]:
    details.allow("experts", "top_k", "rank", "rho", "segments", "scales", "residual", "eta", "rank_for_scale")
    experts = details.integer("experts", 1, _MAX_RANK)
    rank = details.integer("rank", 1, _MAX_RANK)
    if rank % experts:
        raise details.error("INVALID_FIELD", "rank", f"is {rank}, not divisible by {experts} experts")
    geometry = GoatGeometry(
        experts=experts,
        top_k=details.integer("top_k", 1, experts),
        rank=rank,
        rho=details.number("rho", _SMALLEST, _LARGEST),
        segments=cast(Segments, details.choice("segments", _SEGMENTS)),
    )
    if "eta" in details:
        details.number("eta", 0.0, _LARGEST)
    if "rank_for_scale" in details:
        details.choice("rank_for_scale", _RANK_SOURCES)
    given = details.child("scales")
    scales = {path: given.number(path, _SMALLEST, _LARGEST) for path in sorted(given)}
    if not scales:
        raise details.error("INVALID_FIELD", "scales", "names no module")
    return geometry, scales, details.digest("residual")


def _check_segments(geometry: GoatGeometry, sides: Mapping[str, tuple[int, int]], details: ManifestObject) -> None:
    """Refuse experts that are wider than a segment of the spectrum they start from."""
    for path, (inputs, outputs) in sides.items():
        segment = min(inputs, outputs) // geometry.experts
        if geometry.rank // geometry.experts > segment:
            problem = f"is {geometry.rank} for {geometry.experts} experts, but {path} has segments of {segment}"
            raise details.error("INVALID_FIELD", "rank", problem)


def _check_scales(tensors: Mapping[str, Tensor], scales: Mapping[str, float], details: ManifestObject) -> None:
    for name in sorted(tensors):
        path, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix}" in _SUFFIXES and path not in scales:
            raise details.child("scales").error("MISSING_FIELD", path, f"is missing, but {name} is there")


def _check_theory(
    geometry: GoatGeometry,
    scales: Mapping[str, float],
    sides: Mapping[str, tuple[int, int]],
    details: ManifestObject,
) -> None:
    """Hold the scales against where the manifest says that they come from, if it says so."""
    if "eta" not in details or "rank_for_scale" not in details:
        return
    eta = details.number("eta", 0.0, _LARGEST)
    source = cast(RankForScale, details.choice("rank_for_scale", _RANK_SOURCES))
    for path, scale in scales.items():
        wanted = geometry.theoretical_scale(sides[path][0], eta, source)
        if not math.isclose(scale, wanted, rel_tol=_SCALE_TOLERANCE):
            problem = f"is {scale:g}, but eta {eta:g} and the rank_for_scale {source} make it {wanted:g}"
            raise details.child("scales").error("INVALID_FIELD", path, problem)


def _read_residual(source: KindSource, digest: str) -> dict[str, Tensor]:
    if has_file(source.directory, RESIDUAL_FILE):
        content = source.read(source.directory, RESIDUAL_FILE, MAX_TENSOR_FILE_BYTES)
        made_of = parse_metadata(content, file=RESIDUAL_FILE).get(_OF_BASE, source.base.fingerprint)
        if made_of != source.base.fingerprint:
            message = f"{RESIDUAL_FILE} was made of {made_of[:100]}, not of {source.base.fingerprint}"
            raise AdapterMismatchError(message, reason="BASE_MISMATCH", field=RESIDUAL_FILE)
        return parse_tensors(content, file=RESIDUAL_FILE)
    name = _residual_name(digest)
    if source.residuals is None or not has_file(source.residuals, name):
        message = f"there is no {RESIDUAL_FILE}, and no residual {digest} is kept here"
        raise AdapterMismatchError(message, reason="MISSING_RESIDUAL", field="motley_manifest.goat.residual")
    return parse_tensors(source.read(source.residuals, name, MAX_TENSOR_FILE_BYTES), file=name)


def _residual_name(digest: str) -> str:
    return f"{digest.removeprefix('sha256:')}.safetensors"


def _module(
    path: str,
    scale: float,
    geometry: GoatGeometry,
    sides: tuple[int, int],
    *,
    tensors: dict[str, Tensor],
    residuals: dict[str, Tensor],
) -> GoatModule:
    inputs, outputs = sides

    def factor(source: dict[str, Tensor], suffix: str, rank_axis: int) -> Tensor:
        name = f"{path}.{suffix}"
        tensor = take_tensor(source, name)
        expected = (geometry.rank, inputs) if rank_axis == 0 else (outputs, geometry.rank)
        check_factor(name, tensor, expected, rank_axis=rank_axis, source=_RANK_SOURCE)
        return tensor

    router = take_tensor(tensors, f"{path}.goat_router", (torch.float32,))
    check_shape(f"{path}.goat_router", router, (geometry.experts, inputs))
    return GoatModule(
        a=factor(tensors, "goat_A", 0),
        b=factor(tensors, "goat_B", 1),
        router=router,
        scale=scale,
        residual_a=factor(residuals, "residual_A", 0),
        residual_b=factor(residuals, "residual_B", 1),
    )
