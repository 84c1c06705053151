"""What LoQT holds while it trains: the formula's bytes and little more, and one Linear's gradient more at a merge.

Every tensor that an operator makes is counted for as long as its storage lives.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from motley_trainer.job import loop
from motley_trainer.methods.loqt import AttachedLoqt
from motley_trainer.methods.loqt_linear import LoqtLinear
from motley_trainer.spec.settings import LoqtDecomposition
from small_loqts import SmallLoqt, linear_paths, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SIDES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_key_value_heads": 4}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # of a weight: its code, its share of a scale and of that's


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the storages that operators have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.is_host = False  # what is made meanwhile is not counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor) and not self.is_host:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def small(quantization: str, **settings: Any) -> SmallLoqt:
    return SmallLoqt.of(quantization, model=small_model(**SIDES), rank=32, merge_interval=3, **settings)


def peaks(one: SmallLoqt, num_steps: int, monkeypatch: pytest.MonkeyPatch, live: LiveBytes | None = None) -> list[int]:
    """Return the largest number of bytes that each step had alive beyond what was there when training began."""
    found: list[int] = []
    live = LiveBytes() if live is None else live
    real = loop._take_step

    def take_step(*arguments: Any) -> Any:
        live.peak = live.now
        with live:
            told = real(*arguments)
        found.append(live.peak)
        return told

    monkeypatch.setattr("small_loqts._take_step", take_step)
    deque(one.steps(num_steps), maxlen=0)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_between_merges_linears_take_the_formulas_bytes(optimizer: str) -> None:
    one = small("nf4")
    one.optimizing = {"has_8bit_moments": optimizer == "adamw_8bit"}
    deque(one.steps(3), maxlen=0)  # ends with a step that learns: gradients and moments are there
    held = gradients = moments = formula = 0
    per_moment = 1 if optimizer == "adamw_8bit" else 4
    for linear in one.attached._adapted.values():
        held += sum(tensor.nbytes for tensor in linear.tensors().values()) + linear.factor.nbytes
        assert linear.factor.grad is not None
        gradients += linear.factor.grad.nbytes
        state = one.optimizer.state[linear.factor]
        moments += sum(
            value.nbytes for name, value in state.items() if isinstance(value, Tensor) and "qmap" not in name
        )
        smaller, larger = sorted((linear.in_features, linear.out_features))
        formula += int(NF4_BYTES * smaller * larger + NF4_BYTES * smaller * 32)  # weight and frozen factor
        formula += larger * 32 * (4 + 4 + 2 * per_moment)  # the trained one, its gradient, its moments
    assert formula * 0.99 < held + gradients + moments <= 1.05 * formula


def test_no_weight_in_full_stays_anywhere() -> None:
    """Of the storages that the model and all that it was trained by reach, none has the size of a whole weight."""
    one = small("nf4")
    whole = {path: one.model.get_submodule(path).weight.untyped_storage() for path in linear_paths(one.model)}
    sizes = {storage.nbytes() for storage in whole.values()}
    gone = {path: weakref.ref(storage) for path, storage in whole.items()}
    del whole
    deque(one.steps(2), maxlen=0)
    assert [path for path, storage in gone.items() if storage() is not None] == []
    for path, linear in one.attached._adapted.items():
        held = [*linear.tensors().values(), *linear.parameters(), *linear.buffers()]
        assert max(tensor.untyped_storage().nbytes() for tensor in held) < min(sizes), path


def test_a_merge_has_one_linears_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = small("nf4")
    alive: list[weakref.ref[Tensor]] = []
    most: list[int] = []
    real = LoqtLinear.renew

    def renew(linear: LoqtLinear, gradient: Tensor) -> None:
        assert gradient.shape == (linear.out_features, linear.in_features)
        alive.append(weakref.ref(gradient))
        most.append(sum(reference() is not None for reference in alive))
        real(linear, gradient)

    monkeypatch.setattr(LoqtLinear, "renew", renew)
    deque(one.steps(1), maxlen=0)
    assert most == [1] * len(one.attached._adapted)


@pytest.mark.parametrize(
    ("quantization", "decomposition", "dtype"),
    [
        ("none", LoqtDecomposition.SVD, torch.float32),
        ("nf4", LoqtDecomposition.SVD, torch.float32),
        ("nf4", LoqtDecomposition.EIGH, torch.float32),
        ("nf4", LoqtDecomposition.SVD, torch.bfloat16),
    ],
    ids=str,
)
def test_a_merge_peaks_at_most_one_gradient_above_a_step(
    quantization: str, decomposition: LoqtDecomposition, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments that begin anew are let go before the gradients come, and a Linear's work is done in their place."""
    one = small(quantization, decomposition=decomposition)
    one.model.to(dtype)
    found = peaks(one, 6, monkeypatch)
    largest = (
        max(linear.in_features * linear.out_features for linear in one.attached._adapted.values()) * dtype.itemsize
    )
    ordinary = max(found[step] for step in (1, 2, 4, 5))
    assert found[3] <= ordinary + largest, (found, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merge_of_micro_batches_has_its_sums_in_the_hosts_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those apart, it peaks no higher than one of a single batch; they are float32, one for each Linear, and go."""
    live = LiveBytes()
    host: list[int] = []
    gather, renew = AttachedLoqt._gather, LoqtLinear.renew

    def gather_on_host(attached: AttachedLoqt, linear: LoqtLinear, gradient: Tensor) -> None:
        live.is_host = True  # what `gather` makes is the host's, wherever the model lies
        gather(attached, linear, gradient)
        live.is_host = False
        assert {(sums.device.type, sums.dtype) for sums in attached._gathered.values()} == {("cpu", torch.float32)}
        host.append(sum(sums.nbytes for sums in attached._gathered.values()))

    def renew_from_host(linear: LoqtLinear, gradient: Tensor) -> None:
        on_device = [gradient.clone()]  # as from the host's memory to a device's
        del gradient
        renew(linear, on_device.pop())

    monkeypatch.setattr(AttachedLoqt, "_gather", gather_on_host)
    monkeypatch.setattr(LoqtLinear, "renew", renew_from_host)
    one = small("nf4")
    one.model.to(dtype)
    one.training = {"micro_batch_size": 2}
    found = peaks(one, 4, monkeypatch, live)
    sizes = [linear.in_features * linear.out_features * 4 for linear in one.attached._adapted.values()]
    assert max(host) == sum(sizes)
    assert one.attached._gathered == {}
    assert found[3] <= max(found[1:3]) + max(sizes), (found, sizes)


def test_buffers_for_all_gradients_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the one before: gradients that are kept until all are there cross its bound."""
    one = small("nf4")
    kept: list[Tensor] = []
    real: Callable[..., None] = LoqtLinear.renew

    def renew(linear: LoqtLinear, gradient: Tensor) -> None:
        kept.append(gradient)
        real(linear, gradient)

    monkeypatch.setattr(LoqtLinear, "renew", renew)
    found = peaks(one, 6, monkeypatch)
    largest = max(linear.in_features * linear.out_features * 4 for linear in one.attached._adapted.values())
    assert found[3] > max(found[step] for step in (1, 2)) + largest


def kept_inputs(linear: LoqtLinear, x: Tensor) -> Iterator[int]:
    """Yield the sizes of what a Linear keeps for the backward pass, its parameter not counted."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != linear.factor.data_ptr():
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    yield from (tensor.numel() for tensor in kept)


def test_behind_projected_inputs_a_row_keeps_as_many_numbers_as_the_rank() -> None:
    one = small("nf4")
    deque(one.steps(2), maxlen=0)
    for path, linear in one.attached._adapted.items():
        x = torch.randn(7, linear.in_features, requires_grad=True)
        wanted = 7 * 32 if linear.in_features <= linear.out_features else 7 * linear.in_features
        assert list(kept_inputs(linear, x)) == [wanted], path
