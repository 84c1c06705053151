"""What autograd keeps of a forward pass, in bytes: every storage once, those of the model itself not counted.

Runs on the thread that owns the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from motley_trainer.methods.channel_linear import ChannelLinear
from motley_trainer.methods.lora_linear import LoraLinear
from torch import Tensor, nn


@dataclass
class Kept:
    """Bytes by storage: of all operations, and of what Linears kept, trained or not."""

    by_all: dict[int, int] = field(default_factory=dict)
    by_linears: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # so that no storage takes the place of another


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[Kept]:
    """Count what passes through a model keep while the context lasts."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = Kept()

    def keep(tensor: Tensor, is_linears: bool) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.alive.append(tensor)
            kept.by_all[storage.data_ptr()] = storage.nbytes()
            if is_linears:
                kept.by_linears[storage.data_ptr()] = storage.nbytes()
        return tensor

    with ExitStack() as stack:
        stack.enter_context(_watching(lambda tensor: keep(tensor, False)))
        for linear in _linears(model):
            stack.enter_context(_inside(linear, lambda: _watching(lambda tensor: keep(tensor, True))))
        yield kept


def _watching(keep: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def _linears(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every Linear, with what a method has put around it."""
    for module in model.children():
        if isinstance(module, nn.Linear | LoraLinear | ChannelLinear):
            yield module
        else:
            yield from _linears(module)


@contextmanager
def _inside(module: nn.Module, make: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Be inside a context whenever a module computes."""
    entered: list[AbstractContextManager[None]] = []

    def enter(*_: object) -> None:
        entered.append(make())
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
