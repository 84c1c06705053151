"""Adapters applied to transformers' own models, by the definition of a unit: the slow truth about a whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from motley_adapters.spec import Adapter
from motley_kernels.adapter_delta import DeltaUnit
from motley_kernels.adapter_delta.reference import unit_delta
from torch import Tensor, nn


@contextmanager
def applied(model: nn.Module, *adapters: tuple[Adapter, float]) -> Iterator[None]:
    """Add the weighted deltas of adapters, shared parts and all, to a model's Linears."""
    units: dict[str, list[tuple[DeltaUnit, float]]] = {}
    for adapter, weight in adapters:
        for part in adapter.parts:
            for path, unit in part.units.items():
                units.setdefault(path, []).append((unit, weight))
    handles = [model.get_submodule(path).register_forward_hook(_hook(here)) for path, here in units.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: Any, token_ids: Sequence[int]) -> Tensor:
    """Return the logits of every position, [T, V]."""
    with torch.inference_mode():
        answer: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return answer


def delta_rows(unit: DeltaUnit, x: Tensor, out_features: int) -> Tensor:
    """Return what a unit adds to each row of x."""
    return torch.stack([unit_delta(unit, row, out_features) for row in x])


def _hook(units: list[tuple[DeltaUnit, float]]) -> Any:
    def add(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        total = sum(weight * delta_rows(unit, x, output.shape[-1]) for unit, weight in units)
        return output + torch.as_tensor(total).reshape(output.shape)

    return add
