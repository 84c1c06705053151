"""bfloat16 parameters move as float32 ones do, however small the steps are: up or down by chance."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from motley_trainer.job.checkpoint import Checkpoints
from motley_trainer.job.optimizers import make_optimizer
from motley_trainer.job.reporting import JobCancelledError
from motley_trainer.job.rounding import generator_for, put_by_chance
from motley_trainer.spec.settings import OptimizerSettings
from small_loqts import SmallLoqt, small_model
from small_trainings import BINDING, stop_after
from torch import Tensor, nn

KINDS = pytest.mark.parametrize("has_8bit_moments", [False, True], ids=["adamw", "adamw_8bit"])


def drawn(value: float, *, step: int = 1, place: int = 0, count: int = 20_000) -> Tensor:
    parameter = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16))
    put_by_chance(parameter, torch.full((count,), value), generator_for(parameter, step, place))
    return parameter.detach().float()


@pytest.mark.parametrize(
    ("value", "below", "above"),
    [(1 + 1 / 512, 1.0, 1 + 1 / 128), (-1 - 3 / 512, -1 - 1 / 128, -1.0), (2 - 1 / 1024, 2 - 1 / 128, 2.0)],
)
def test_a_number_becomes_one_of_its_neighbours_and_is_itself_on_average(
    value: float, below: float, above: float
) -> None:
    found = drawn(value)
    assert set(found.tolist()) == {below, above}
    spread = (above - below) / 2 / 20_000**0.5  # of the mean, at most
    assert float(found.double().mean()) == pytest.approx(value, abs=5 * spread)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0078125, 2.0**-126, float("inf"), -float("inf")])
def test_what_bfloat16_has_stays(value: float) -> None:
    assert set(drawn(value, count=100).tolist()) == {value}


def test_no_number_stays_none_whatever_its_bits_are() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32)
    for step in range(20):
        parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        put_by_chance(parameter, bits.view(torch.float32), generator_for(parameter, step, 0))
        assert parameter.isnan().all()


def test_chance_is_of_the_step_and_the_place() -> None:
    first = drawn(1.001, count=100)
    assert torch.equal(first, drawn(1.001, count=100))
    assert not torch.equal(first, drawn(1.001, step=2, count=100))
    assert not torch.equal(first, drawn(1.001, place=1, count=100))


def test_a_float32_parameter_gets_every_bit() -> None:
    parameter, values = nn.Parameter(torch.zeros(100)), torch.linspace(-1, 1, 100)
    put_by_chance(parameter, values, generator_for(parameter, 1, 0))
    assert torch.equal(parameter, values)


@KINDS
def test_many_small_steps_move_bfloat16_as_far_as_float32(has_8bit_moments: bool) -> None:
    """A step of 1e-4 is far below half of the last bit of 1, which is 1/256: rounded to the nearest, nothing moves."""
    settings = OptimizerSettings(learning_rate=1e-4, has_8bit_moments=has_8bit_moments)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        parameter = nn.Parameter(torch.ones(4096, dtype=dtype))
        optimizer = make_optimizer([parameter], settings)
        for step in range(40):
            parameter.grad = torch.linspace(1, 2, 4096).to(dtype) * (1 + step % 3)
            optimizer.step()
        moved[dtype] = float(1 - parameter.detach().double().mean())
        assert set(optimizer.state) == {parameter}
    assert moved[torch.float32] == pytest.approx(3.75e-3, rel=0.01)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.1)


@KINDS
def test_norms_of_a_bfloat16_base_move_at_a_small_rate(has_8bit_moments: bool) -> None:
    one = SmallLoqt.of("nf4", model=small_model(num_hidden_layers=1).bfloat16(), compensation_steps=1)
    one.optimizing = {"learning_rate": 1e-4, "has_8bit_moments": has_8bit_moments}
    norm = one.model.model.norm.weight
    before = norm.detach().clone()
    deque(one.steps(6), maxlen=0)
    assert norm.dtype == torch.bfloat16
    assert not torch.equal(norm, before)


@KINDS
def test_going_on_gives_the_same_bits(tmp_path: Path, has_8bit_moments: bool) -> None:
    found: list[dict[str, Any]] = []
    for stops in ((), (2, 1, 3)):  # looks: the merges are before steps 2, 4 and 6
        folder = tmp_path / str(len(stops))
        for stop in (*stops, None):
            one = SmallLoqt.of("nf4", model=small_model(num_hidden_layers=1).bfloat16(), compensation_steps=1)
            one.training, one.optimizing = {"steps": 8}, {"has_8bit_moments": has_8bit_moments}
            if stop is None:
                one.train(folder)
                continue
            with pytest.raises(JobCancelledError):
                one.train(folder, stop_after(stop))
        last = Checkpoints(folder, BINDING).latest()
        assert last is not None
        found.append(dict(last.tensors))
    for one_tensors, other in pairwise(found):
        assert one_tensors.keys() == other.keys()
        assert {name for name in other if not torch.equal(one_tensors[name], other[name])} <= {"buffer.num_told"}
