"""Routed experts on Linears that learn (GOAT), started from the spectrum of the base and trained on the base as it is.

Owns the segments of the spectrum, the start, the gate and the balance loss. The base's weights are never edited: what
the method would take off them is a third, frozen term. Knows nothing of files and text.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Geometry(NamedTuple):
    """The shape of the experts of one adapter; `rho` damps the start, `eta` is full training's rate over ours."""

    num_experts: int = 4
    top_k: int = 2
    rank: int = 8
    rho: float = 10.0
    eta: float = 1.0

    @property
    def expert_rank(self) -> int:
        """Return the rank of each expert."""
        return self.rank // self.num_experts

    def scaling(self, in_features: int) -> float:
        """Return the scaling that makes a low-rank step as long as full training's, by the rank of one expert."""
        return math.sqrt(3 * in_features * self.eta / self.expert_rank)

    def residual_scaling(self) -> float:
        """Return the coefficient of the unscaled spectral factors: minus the mean of what the experts start from."""
        return -1 / (self.rho * self.num_experts)


class RoutedExperts(nn.Module):
    """A frozen Linear, its experts under a router, and the frozen residual that balances their start.

    Shapes: a [R, I], b [O, R], router [E, I]; residual_a [R, I] and residual_b [O, R] hold the square root of the
    singular values each.
    """

    def __init__(self, linear: nn.Linear, geometry: Geometry) -> None:
        super().__init__()
        self.linear, self.geometry = linear, geometry
        self.scaling = geometry.scaling(linear.in_features)
        self.residual_b, self.residual_a = spectral_factors(linear.weight.detach(), geometry)
        damping = math.sqrt(self.scaling * geometry.rho)
        self.a, self.b = nn.Parameter(self.residual_a / damping), nn.Parameter(self.residual_b / damping)
        self.router = nn.Parameter(torch.empty(geometry.num_experts, linear.in_features))
        nn.init.uniform_(self.router, -1 / math.sqrt(linear.in_features), 1 / math.sqrt(linear.in_features))
        self.balance = torch.zeros(())
        self.shares = torch.zeros(geometry.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Add the chosen experts and take off the residual; leave this pass's balance loss in `balance`."""
        logits = x @ self.router.T
        kept, chosen = logits.topk(self.geometry.top_k)
        shares = torch.zeros_like(logits).scatter(-1, chosen, kept.softmax(-1))
        self._weigh(logits.softmax(-1).flatten(0, -2), shares.detach().flatten(0, -2) > 0)
        gates = shares.repeat_interleave(self.geometry.expert_rank, dim=-1)
        delta = self.scaling * ((x @ self.a.T) * gates) @ self.b.T
        residual = self.geometry.residual_scaling() * (x @ self.residual_a.T) @ self.residual_b.T
        return self.linear(x) + delta + residual

    def _weigh(self, probabilities: Tensor, is_chosen: Tensor) -> None:
        """Compute the paper's loss, 1 where routing is uniform; its gradient flows through the probabilities alone."""
        self.shares = is_chosen.float().mean(0) / self.geometry.top_k
        self.balance = self.geometry.num_experts * (self.shares * probabilities.mean(0)).sum()


def spectral_factors(weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Cut the spectrum into as many equal segments as experts and take the head of each.

    Shapes: returns U S^.5 [O, R] and S^.5 V^T [R, I], the experts' directions one after the other.
    """
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    length = len(s) // geometry.num_experts
    taken = [expert * length + place for expert in range(geometry.num_experts) for place in range(geometry.expert_rank)]
    root = s[taken].sqrt()
    return u[:, taken] * root, root[:, None] * vt[taken]


def attach_experts(base: PreTrainedModel, names: list[str], geometry: Geometry) -> dict[str, RoutedExperts]:
    """Put experts on every Linear of these names, and give them by module path."""
    attached: dict[str, RoutedExperts] = {}
    for path, module in list(base.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in names:
            attached[path] = RoutedExperts(module, geometry)
            setattr(base.get_submodule(parent), name, attached[path])
    return attached
