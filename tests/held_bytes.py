"""How many bytes a loaded base holds: every storage that its modules reach, each counted once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from motley_bases.packing import PackedLinear
from torch import Tensor, nn


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all storages that a model's weights lie in, with what quantizing and packing adds."""
    storages: dict[int, int] = {}
    packed = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            packed += int(torch.ops.mkldnn._nbytes(module.packed))
            tensors: list[Tensor] = [module.bias] if module.bias is not None else []
        else:
            tensors = list(_tensors(module))
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return packed + sum(storages.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        yield tensor
        for name in ("CB", "SCB"):
            if isinstance(extra := getattr(tensor, name, None), Tensor):
                yield extra
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            yield from (value for value in (state.absmax, state.code, state.offset) if isinstance(value, Tensor))
            state = state.state2
    state = getattr(module, "state", None)  # of an INT8 Linear, once it has run
    for name in ("CB", "SCB"):
        if isinstance(extra := getattr(state, name, None), Tensor):
            yield extra
