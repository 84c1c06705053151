"""Put read adapters on a transformers model, any kinds and weights together, by adding to what its Linears return.

Owns the sum in plain torch, written from the kinds' formulas and sharing nothing with the served operator, so that the
two can be held against each other. The base's weights are not touched.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from motley_adapters.spec import Adapter
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor, device, nn
from transformers import PreTrainedModel


@contextmanager
def wear(model: PreTrainedModel, adapters: Iterable[tuple[Adapter, float]]) -> Iterator[PreTrainedModel]:
    """Let a model answer under adapters with their weights while the context lasts."""
    worn: dict[str, list[tuple[DeltaUnit, float]]] = {}
    for adapter, weight in adapters:
        for part in adapter.parts:  # a part that two of them share is added twice, which sums its weights
            for path, unit in part.units.items():
                worn.setdefault(path, []).append((_on(model.device, unit), weight))
    handles = [model.get_submodule(path).register_forward_hook(_adding(units)) for path, units in worn.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _on(where: device, unit: DeltaUnit) -> DeltaUnit:
    held = {name: getattr(unit, name) for name in ("a", "b", "inputs", "outputs")}
    gate = None if unit.gate is None else replace(unit.gate, router=unit.gate.router.to(where))
    return replace(unit, **{name: None if it is None else it.to(where) for name, it in held.items()}, gate=gate)


def _adding(units: list[tuple[DeltaUnit, float]]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, total = inputs[0].float(), output.float()
        for unit, weight in units:
            total = total + weight * delta(unit, x, output.shape[-1])
        return total.to(output.dtype)

    return add


def delta(unit: DeltaUnit, x: Tensor, out_features: int) -> Tensor:
    """Return what one unit adds. Shapes: x [..., I] float32; returns [..., O]."""
    read = x if unit.inputs is None else x[..., unit.inputs.long()]
    products = read if unit.a is None else read @ unit.a.float().T
    if unit.gate is not None:
        kept, chosen = (x @ unit.gate.router.T).topk(unit.gate.top_k)
        shares = x.new_zeros(*x.shape[:-1], unit.gate.num_experts).scatter(-1, chosen, kept.softmax(-1))
        products = products * shares.repeat_interleave(unit.rank // unit.gate.num_experts, dim=-1)
    written = unit.scaling * (products if unit.b is None else products @ unit.b.float())
    if unit.outputs is None:
        return written
    return x.new_zeros(*x.shape[:-1], out_features).index_copy(-1, unit.outputs.long(), written)
