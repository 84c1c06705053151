"""What S2FT keeps of a forward pass for the backward pass: the chosen inputs behind columns, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures import build_checkpoint
from motley_bases.loader import load_base, load_model
from motley_trainer.data.batches import Batch, summed_loss
from motley_trainer.methods.channel_linear import ChannelLinear
from motley_trainer.methods.method import Context
from motley_trainer.methods.s2ft import S2ft
from motley_trainer.spec.settings import S2ftSettings
from torch import Tensor, nn
from transformers import PreTrainedModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint("llama", tmp_path_factory.mktemp("base"))


@contextmanager
def kept_for_backward(but: Callable[[int], bool]) -> Iterator[dict[int, int]]:
    """Collect the elements of each storage that autograd keeps, parameters' not counted."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not but(storage.data_ptr()):
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def test_behind_columns_only_the_chosen_inputs_are_kept() -> None:
    linear = nn.Linear(512, 64).requires_grad_(False)
    tokens, channels = 40, torch.arange(0, 512, 64)
    sparse = ChannelLinear(linear, "input", channels)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*sparse.parameters(), sparse.channels)}
    with kept_for_backward(own.__contains__) as kept:
        y = sparse(torch.randn(tokens, 512, requires_grad=True))
    assert sum(kept.values()) == tokens * len(channels)
    with kept_for_backward(own.__contains__) as kept:
        dense = nn.functional.linear(torch.randn(tokens, 512), linear.weight.detach().clone().requires_grad_())
    assert sum(kept.values()) == tokens * 512
    assert y.requires_grad
    assert dense.requires_grad


def kept_by(model: PreTrainedModel, paths: dict[str, int], batches: Batch) -> dict[str, int]:
    """Return the bytes that each Linear keeps for a backward pass and that are not there for another's sake as well.

    Semantics: of a storage that is kept whole already, by whoever came before, a Linear keeps nothing more; parameters
    and what belongs to the base are not counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    known, found = set(own), dict.fromkeys(paths, 0)
    inside: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and inside:
            found[inside[-1]] += storage.nbytes()
            held.append(tensor)  # so that no other storage comes to lie where it was
            known.add(storage.data_ptr())
        return tensor

    held: list[Tensor] = []
    for path in paths:
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda module, inputs, path=path: inside.append(path))
        module.register_forward_hook(lambda module, inputs, output: inside.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, batches)
    return found


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", torch.bfloat16), ("nf4", torch.float32), ("nf4", torch.bfloat16)]
)
def test_inside_a_served_base_only_the_chosen_inputs_are_kept(
    checkpoint: Path, quantization: str, dtype: torch.dtype
) -> None:
    """T * s values behind the columns of o_proj and down_proj, in the base's own type, whatever holds the weight."""
    spec = load_base(checkpoint, dtype="float32", device=CPU).spec
    model = load_model(checkpoint, dtype, CPU, quantization)
    settings = S2ftSettings(o_share=0.5, down_share=0.1)
    attached = S2ft(settings).attach(model, Context(spec, 0, lambda count: []), None)
    rows, length = 5, 9
    tokens = torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(1))
    widths = {path: len(linear.channels) for path, linear in attached._linears.items()}
    kept = kept_by(model, widths, Batch(tokens, torch.ones_like(tokens), tokens))
    assert len(widths) == 6
    assert kept == {path: rows * length * width * dtype.itemsize for path, width in widths.items()}


def test_behind_rows_the_input_is_kept_as_it_came_and_no_wider_copy_of_it() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    sparse = ChannelLinear(linear, "output", torch.arange(0, 32, 8))
    with torch.no_grad():
        sparse.block.normal_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*sparse.parameters(), sparse.channels)}
    x = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    with kept_for_backward(own.__contains__) as kept:
        y = sparse(x)
    assert set(kept) == {x.untyped_storage().data_ptr()}
    y.sum().backward()
    wide = x.detach().float().requires_grad_()
    block = sparse.block.detach().clone().requires_grad_()
    whole = nn.functional.linear(wide, linear.weight.float(), linear.bias.float())
    (whole.sum() + nn.functional.linear(wide, block).sum()).backward()
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(sparse.block.grad, block.grad)
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=2e-2, atol=2e-2)
