"""How GOAT training begins: slices of the base's singular vectors as experts, and the residual that balances them.

Formulas alone, in float32 and on the weight's own device; the server never runs them, since a residual is stored and
not computed again. Pure; any thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from motley_adapters.errors import AdapterFormatError
from motley_adapters.kinds.goat import GoatGeometry, RankForScale


@dataclass(frozen=True, eq=False, slots=True)
class SpectrumSlices:
    """The singular directions that each expert starts from, experts one after the other.

    Shapes: left [O, R], singular_values [R], right [R, I].
    """

    left: Tensor
    singular_values: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """Return R."""
        return len(self.singular_values)

    @property
    def residual_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors (a [R, I], b [O, R]) that adapters of the same base and geometry share, unscaled."""
        roots = self.singular_values.sqrt()
        return roots[:, None] * self.right, self.left * roots

    def initial_factors(self, scale: float, rho: float) -> tuple[Tensor, Tensor]:
        """Return every expert's first factors, (a [R, I], b [O, R]).

        Semantics: scale * b_e a_e is the expert's slice of the weight divided by rho, whatever the scale.
        """
        a, b = self.residual_factors
        shrink = 1.0 / math.sqrt(scale * rho)
        return shrink * a, shrink * b

    def initial_deviation(self, shares: Tensor, x: Tensor, rho: float) -> Tensor:
        """Return by how much the first output differs from the base's, in closed form.

        Semantics: zero where every expert has the same share, and otherwise only on average over routings.
        Shapes: shares [T, E], x [T, I]; returns [T, O].
        """
        num_experts = shares.shape[1]
        gates = (shares - 1.0 / num_experts).repeat_interleave(self.rank // num_experts, dim=1)
        products = gates * self.singular_values * (x @ self.right.T)
        return products @ self.left.T / rho


def check_geometry(geometry: GoatGeometry, in_features: int, out_features: int) -> None:
    """Refuse a geometry that a Linear of these sides has no room for.

    Raises: AdapterFormatError with reason INVALID_GEOMETRY; the field is that of the geometry.
    """
    experts, rank = geometry.experts, geometry.rank
    if experts < 1:
        _refuse("experts", f"{experts} experts")
    if rank < experts:
        _refuse("rank", f"a rank of {rank} leaves some of {experts} experts without any")
    if rank % experts:
        _refuse("rank", f"a rank of {rank} is not divisible by {experts} experts")
    if not 1 <= geometry.top_k <= experts:
        _refuse("top_k", f"top_k is {geometry.top_k} of {experts} experts")
    if not (math.isfinite(geometry.rho) and geometry.rho > 0):
        _refuse("rho", f"rho is {geometry.rho}")
    segment = min(in_features, out_features) // experts
    if rank // experts > segment:
        message = (
            f"each of {experts} experts takes {rank // experts} directions, its segment of the spectrum has {segment}"
        )
        _refuse("rank", message)


def expert_directions(
    geometry: GoatGeometry, in_features: int, out_features: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return which singular directions each expert starts from, 0 being that of the largest singular value.

    Semantics: the spectrum has E equal segments; `head` takes the first directions of each, `mini` the last;
    `principal` takes the first of the whole spectrum, `minor` the last; `random` takes whole blocks, drawn by the
    generator, which it needs.
    Shapes: returns [E, R / E] int64.
    Raises: AdapterFormatError with reason INVALID_GEOMETRY.
    """
    check_geometry(geometry, in_features, out_features)
    experts, width = geometry.experts, geometry.rank // geometry.experts
    num_directions = min(in_features, out_features)
    segment = num_directions // experts
    match geometry.segments:
        case "head":
            starts = torch.arange(experts) * segment
        case "mini":
            starts = torch.arange(1, experts + 1) * segment - width
        case "principal":
            starts = torch.arange(experts) * width
        case "minor":
            starts = num_directions - geometry.rank + torch.arange(experts) * width
        case "random":
            if generator is None:
                _refuse("segments", "random segments need a generator")
            starts = torch.randperm(num_directions // width, generator=generator)[:experts] * width
    return starts[:, None] + torch.arange(width)


def slice_spectrum(weight: Tensor, geometry: GoatGeometry, generator: torch.Generator | None = None) -> SpectrumSlices:
    """Decompose a Linear's weight [O, I] in float32 and take what the experts start from.

    Raises: AdapterFormatError with reason INVALID_GEOMETRY.
    """
    return take_directions(weight, expert_directions(geometry, weight.shape[1], weight.shape[0], generator))


def take_directions(weight: Tensor, directions: Tensor) -> SpectrumSlices:
    """Decompose a Linear's weight [O, I] in float32 and take singular directions [E, R / E], in their order."""
    directions = directions.flatten().to(weight.device)
    left, singular_values, right = torch.linalg.svd(weight.detach().to(torch.float32), full_matrices=False)
    return SpectrumSlices(left[:, directions], singular_values[directions], right[directions])


def theoretical_scale(
    geometry: GoatGeometry, in_features: int, *, eta: float, rank_for_scale: RankForScale = "expert"
) -> float:
    """Return the scale at which the low-rank gradient has the size of full fine-tuning's.

    Semantics: sqrt(3 * in_features * eta / rank), eta being full fine-tuning's learning rate over the adapter's; the
    rank is one expert's or all experts'. It differs between Linears, because in_features does.
    Raises: AdapterFormatError with reason INVALID_GEOMETRY if eta is not positive.
    """
    if not (math.isfinite(eta) and eta > 0):
        _refuse("eta", f"eta is {eta}")
    return geometry.theoretical_scale(in_features, eta, rank_for_scale)


def _refuse(field: str, message: str) -> NoReturn:
    raise AdapterFormatError(message, reason="INVALID_GEOMETRY", field=field)
