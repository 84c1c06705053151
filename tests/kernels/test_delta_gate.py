"""The gate's definition: which experts share a token, and how ties are broken."""

from __future__ import annotations

import torch
from motley_kernels.adapter_delta.reference import expert_shares
from motley_kernels.adapter_delta.types import Gate


def test_equal_routers_are_a_tie_whatever_their_numbers() -> None:
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(192, generator=generator)
    gate = Gate(row.expand(8, -1).contiguous(), 1)
    for _ in range(100):
        shares = expert_shares(gate, torch.randn(192, generator=generator))
        assert shares.tolist() == [1.0, *[0.0] * 7]
