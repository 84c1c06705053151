"""The compiled loop over single tokens: how it rounds, what it reads, and how it shares its work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import motley_kernels
import numpy as np
import pytest
import torch
from delta_problems import apply, define, draw_problem, pooled, table_of
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from motley_kernels.adapter_delta.types import Gate, Segment
from motley_kernels.errors import ShapeError
from motley_kernels.testing import assert_close, draw_inputs, draw_unit
from torch import Generator, Tensor

ONE = DeltaBatch.from_sets([((0, 1.0),)])


def add_numbers(y: Tensor, added: Tensor) -> Tensor:
    """Add float32 numbers to a row by way of a unit of rank one, whose only input is 1."""
    units = UnitTable(1, len(added))
    units.bind(0, DeltaUnit(torch.ones(1, 1), added.unsqueeze(0), 1.0))
    result = y.clone().unsqueeze(0)
    add_delta(result, torch.ones(1, 1, dtype=y.dtype), units, ONE, implementation="grouped")
    return result[0]


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    y = bits.view(torch.bfloat16)  # every number there is, each of them off by a little, by half and by more than half
    for added in (0.0, 2.0**-9, 2.0**-8, 3 * 2.0**-9, -(2.0**-8), 1e-40, 3e38, -3e38, torch.inf, torch.nan):
        numbers = torch.full((len(y),), added)
        expected = (y.float() + numbers).to(torch.bfloat16)
        torch.testing.assert_close(add_numbers(y, numbers), expected, rtol=0, atol=0, equal_nan=True)
    full = torch.full((len(y),), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that rounds to a number
    assert bool(add_numbers(y, full).isnan().all())
    ulps = y.float() * 2.0**-8  # half a step of each number: a tie
    torch.testing.assert_close(
        add_numbers(y, ulps), (y.float() + ulps).to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_do_not_lie_side_by_side_are_served(dtype: torch.dtype) -> None:
    problem = draw_problem(1, "uniform", (48, 40), [1] * 9, dtype)
    expected = define(problem.units, problem.batch, problem.x, problem.y)
    wide = torch.full((9, 80), 7.0, dtype=dtype)
    y = wide[:, ::2]
    y.copy_(problem.y)
    x = problem.x.repeat_interleave(2, dim=1)[:, ::2]
    assert not x.is_contiguous()
    add_delta(y, x, problem.units, problem.batch, implementation="grouped")
    assert_close(y, expected, dtype)
    assert bool((wide[:, 1::2] == 7).all()), "nothing beside the output is written"


def test_inputs_and_outputs_may_differ_in_dtype() -> None:
    problem = draw_problem(2, "uniform", (48, 40), [1] * 5)
    y = problem.y.to(torch.bfloat16)
    expected = define(problem.units, problem.batch, problem.x, y)
    add_delta(y, problem.x, problem.units, problem.batch, implementation="grouped")
    assert_close(y, expected, torch.bfloat16)


def test_experts_that_a_token_did_not_choose_are_not_read() -> None:
    generator = Generator().manual_seed(0)
    unit = draw_unit(8, 16, 12, generator)
    assert unit.a is not None
    assert unit.b is not None
    router = torch.zeros(4, 16)
    router[2] = 1
    a, b = unit.a.clone(), unit.b.clone()
    for factor in (a, b):
        factor[:4], factor[6:] = torch.nan, torch.nan
    x, y = draw_inputs(1, 16, generator).abs(), torch.zeros(1, 12)
    units = pooled(table_of(DeltaUnit(a, b, 1.0, gate=Gate(router, 1)), sides=(16, 12)))
    alone = table_of(DeltaUnit(unit.a[4:6], unit.b[4:6], 1.0), sides=(16, 12))
    assert_close(apply(units, ONE, x, y), define(alone, ONE, x, y), torch.float32)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_unequal_work_is_dealt_to_threads_without_a_change_of_bits(num_threads: int) -> None:
    problem = draw_problem(3, "distinct", (64, 48), [1] * 7)
    expected = [
        apply(problem.units, DeltaBatch.from_sets([members]), problem.x[n : n + 1], problem.y[n : n + 1])
        for n, (members, _) in enumerate(problem.sequences)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(apply(problem.units, problem.batch, problem.x, problem.y), torch.cat(expected))
    finally:
        torch.set_num_threads(before)


def copy_package(target: Path) -> None:
    """Copy the kernels, so that what is compiled of them lies beside the copy."""
    source = Path(motley_kernels.__path__[0])
    for file in source.rglob("*.py"):
        copied = target / "motley_kernels" / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())


def warm_up_apart(place: Path, **variables: str) -> str:
    """Warm up in a process of its own that sees the copy in `place`, and return what it logged and printed."""
    program = """
import logging, torch
logging.basicConfig()
torch.set_num_threads(1)
from motley_kernels.adapter_delta import warm_up
warm_up(torch.device("cpu"), torch.bfloat16)
import numba
print("threads", torch.get_num_threads(), numba.get_num_threads())
"""
    environ = {**os.environ, "PYTHONPATH": str(place), **variables}
    environ.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, check=True, timeout=120, cwd=place, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_where_nothing_can_be_written_it_compiles_all_the_same(tmp_path: Path) -> None:
    copy_package(tmp_path)
    package = tmp_path / "motley_kernels"
    # A file in the place of a folder: not even the superuser writes below it.
    for folder in [package, *package.iterdir()]:
        if folder.is_dir():
            (folder / "__pycache__").touch()
    (tmp_path / "file").touch()
    assert "WARNING" not in warm_up_apart(tmp_path, HOME=str(tmp_path / "file"))


def test_a_damaged_file_of_compiled_code_is_passed_by(tmp_path: Path) -> None:
    copy_package(tmp_path)
    assert "WARNING" not in warm_up_apart(tmp_path)
    kept = list(tmp_path.rglob("*.nbi"))
    assert kept, "what is compiled lies beside the source"
    for file in kept:
        file.write_bytes(file.read_bytes()[:20])
    assert "compiling it anew" in warm_up_apart(tmp_path)


def test_threads_stay_as_many_as_torch_was_given(tmp_path: Path) -> None:
    copy_package(tmp_path)
    assert "threads 1 1" in warm_up_apart(tmp_path, NUMBA_NUM_THREADS="4")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_channels_that_a_linear_has_not_are_refused(side: str, wrong: int) -> None:
    channels = torch.tensor([0, wrong], dtype=torch.int32)
    block = torch.ones(2, 8)
    unit = (
        DeltaUnit(None, block, 1.0, inputs=channels)
        if side == "inputs"
        else DeltaUnit(block, None, 1.0, outputs=channels)
    )
    with pytest.raises(ShapeError, match="channels"):
        apply(table_of(unit, sides=(8, 8)), ONE, torch.ones(1, 8), torch.zeros(1, 8))


@pytest.mark.parametrize("token", [-1, 1])
def test_tokens_that_a_batch_has_not_are_refused(token: int) -> None:
    units = table_of(draw_unit(2, 8, 8, Generator().manual_seed(0)), sides=(8, 8))
    batch = DeltaBatch(1, (Segment(((0, 1.0),), torch.tensor([token])),))
    with pytest.raises(ShapeError, match="tokens"):
        apply(units, batch, torch.ones(1, 8), torch.zeros(1, 8))


@pytest.mark.parametrize("is_run", [False, True])
def test_a_segment_without_tokens_adds_nothing(is_run: bool) -> None:
    units = table_of(draw_unit(2, 8, 8, Generator().manual_seed(0)), sides=(8, 8))
    batch = DeltaBatch(1, (Segment(((0, 1.0),), torch.tensor([], dtype=torch.int64), is_run),))
    assert not apply(units, batch, torch.ones(1, 8), torch.zeros(1, 8)).any()


def test_two_memories_that_begin_at_one_address_are_two() -> None:
    numbers = np.ones(64, dtype=np.float32)
    short, whole = torch.from_numpy(numbers[:8]).view(1, 8), torch.from_numpy(numbers).view(8, 8)[7:]
    units = table_of(DeltaUnit(short, torch.ones(1, 8), 1.0), DeltaUnit(short, whole, 1.0), sides=(8, 8))
    batch = DeltaBatch.from_sets([((1, 1.0),)])
    x, y = torch.ones(1, 8), torch.zeros(1, 8)
    assert_close(apply(units, batch, x, y), define(units, batch, x, y), torch.float32)
