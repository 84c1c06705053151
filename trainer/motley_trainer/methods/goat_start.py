"""What GOAT's experts begin as in each Linear: slices of its weight's spectrum, their scale, a fresh router.

A job decomposes a weight once at most: a checkpoint holds the residual, and an adapter's files do. Of a weight
that is quantized it is that of what its products have. Runs on the thread that owns the model.
Source: GOAT, arXiv:2502.16894.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from motley_adapters.errors import AdapterFormatError
from motley_adapters.kinds.checks import check_products
from motley_adapters.kinds.goat import GoatGeometry, GoatModule, Segments
from motley_adapters.kinds.goat_init import check_geometry, expert_directions, theoretical_scale
from motley_bases.quantization import NONE
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor, nn

from motley_trainer.errors import SettingsError
from motley_trainer.methods.goat_linear import Start
from motley_trainer.methods.product_weight import product_weight
from motley_trainer.methods.spectra import Spectra
from motley_trainer.methods.targets import check_rank
from motley_trainer.spec.settings import GoatScale, GoatSettings, derived_seed


def geometry_of(settings: GoatSettings) -> GoatGeometry:
    """Return what all Linears have in common."""
    return GoatGeometry(
        experts=settings.experts,
        top_k=settings.top_k,
        rank=settings.rank,
        rho=settings.rho,
        segments=cast(Segments, str(settings.segments)),
    )


def scales_of(settings: GoatSettings, spec: BaseSpec, paths: Sequence[str]) -> dict[str, float]:
    """Return what the experts of each Linear are multiplied by, having seen that the geometry fits all of them.

    Raises: SettingsError with reason RANK_TOO_LARGE for a Linear whose spectrum has no room for the experts, or
    INVALID_GEOMETRY for settings that no reader lets through; naming the field.
    """
    for path in paths:
        check_rank(settings.rank, path, spec, "goat.rank")
        with _named():
            check_geometry(geometry_of(settings), *spec.linears[path])
    return {path: scale_of(settings, spec.linears[path][0]) for path in paths}


def scale_of(settings: GoatSettings, in_features: int) -> float:
    """Return what a Linear's experts are multiplied by.

    Semantics: THEORETICAL is sqrt(3 in_features eta / rank), the rank being one expert's or all experts'; ALPHA is
    alpha over one expert's rank.
    Raises: SettingsError with reason INVALID_GEOMETRY for an eta that is not positive.
    """
    if settings.scale is GoatScale.ALPHA:
        return settings.alpha / (settings.rank // settings.experts)
    with _named():
        return theoretical_scale(
            geometry_of(settings), in_features, eta=settings.eta, rank_for_scale=settings.rank_for_scale.value
        )


def sliced_start(
    linear: nn.Linear,
    path: str,
    settings: GoatSettings,
    *,
    scale: float,
    seed: int,
    router: Tensor,
    spectra: Spectra,
) -> Start:
    """Decompose a Linear's weight in float32, unless that was done before, and return what its experts begin as.

    Semantics: RANDOM segments are drawn by the seed and the path, so that jobs of one seed share their residual.
    """
    drawn = torch.Generator().manual_seed(derived_seed(seed, "segments", path))
    directions = expert_directions(geometry_of(settings), linear.in_features, linear.out_features, drawn)
    slices = spectra.slices(product_weight(linear), directions)
    return Start(*slices.initial_factors(scale, settings.rho), router, *slices.residual_factors)


def check_start(start: Start, path: str, settings: GoatSettings, scale: float) -> None:
    """Refuse experts or a residual that no server would take, before a step is taken with them.

    Raises: SettingsError with reason WEIGHT_TOO_LARGE, naming the field.
    """
    module = GoatModule(start.a, start.b, start.router, scale, start.residual_a, start.residual_b)
    of_scale = "goat.alpha" if settings.scale is GoatScale.ALPHA else "goat.eta"
    a, b = start.a, start.b.T
    begun = (
        ("residual", module.residual_unit(geometry_of(settings).residual_scaling), "goat.rho"),
        ("experts", module.unit(settings.top_k), of_scale),
        ("experts", DeltaUnit(a, torch.zeros_like(b), 1.0), of_scale),  # each factor as a file has it
        ("experts", DeltaUnit(torch.zeros_like(a), b, 1.0), of_scale),
    )
    for what, unit, field in begun:
        try:
            check_products(f"what the {what} of {path} begin as", unit)
        except AdapterFormatError as error:
            raise SettingsError(error.message, reason=error.reason, field=field) from error


def blank_start(router: Tensor, residual_a: Tensor, residual_b: Tensor) -> Start:
    """Return a start whose experts a checkpoint is about to fill."""
    return Start(torch.zeros_like(residual_a), torch.zeros_like(residual_b), router, residual_a, residual_b)


def fresh_router(num_experts: int, in_features: int, initial: torch.Generator) -> Tensor:
    """Draw a router as a Linear without bias begins. Shapes: [E, I] float32."""
    router = torch.empty(num_experts, in_features)
    nn.init.kaiming_uniform_(router, a=math.sqrt(5), generator=initial)
    return router


def spectrum_source(spec: BaseSpec) -> str:
    """Say of what the spectrum is."""
    if spec.quantization != NONE:
        return f"float32 SVD of the dequantized {spec.quantization} weights"
    return f"float32 SVD of the {spec.dtype} weights"


@contextmanager
def _named() -> Iterator[None]:
    """Name the field of a geometry as the settings do."""
    try:
        yield
    except AdapterFormatError as error:
        raise SettingsError(error.message, reason=error.reason, field=f"goat.{error.field}") from error
