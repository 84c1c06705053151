"""Every kernel of the Triton adapter delta, in every configuration that a launch can ask for, compiles for sm_90."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled_kernels import SHARED_BYTES, compile_kernel
from motley_kernels.adapter_delta import DeltaBatch, UnitTable, triton_impl
from motley_kernels.launch import Launch
from motley_kernels.testing import KINDS, draw_goat, draw_kind, draw_unit
from torch import Generator, Tensor

SETS = [tuple((slot, 1.0) for slot in range(len(KINDS)))] * 2


@pytest.fixture(autouse=True)
def _compile_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_launches(planned: list[Launch]) -> dict[str, str]:
    """Compile, and return each kernel's PTX by name."""
    ptx = {}
    for launch in planned:
        compiled = compile_kernel(launch.kernel, launch.arguments, launch.constants, launch.options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES, launch.kernel.__name__
        ptx[launch.kernel.__name__] = compiled.asm["ptx"]
    return ptx


def mixed_launches(
    x_type: torch.dtype, factor_type: torch.dtype, is_aligned: bool, in_features: int = 3072
) -> list[Launch]:
    """Plan a batch of all kinds; the widths of compact units are odd, so where all is aligned there is none."""
    generator = Generator().manual_seed(0)
    units = UnitTable(in_features, 128)
    for slot, kind in enumerate(KINDS):
        if not (is_aligned and kind.startswith("compact")):
            units.bind(slot, draw_kind(kind, 16, in_features, 128, generator, factor_type))
    return triton_impl.launches(*activations(in_features, 128, x_type), units, DeltaBatch.from_sets(SETS))


def activations(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(SETS), out_features, dtype=dtype), torch.zeros(len(SETS), in_features, dtype=dtype)


@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize(
    ("x_type", "factor_type"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_kernels_compile(x_type: torch.dtype, factor_type: torch.dtype, is_aligned: bool) -> None:
    planned = mixed_launches(x_type, factor_type, is_aligned)
    assert planned[0].constants["IS_ALIGNED"] == is_aligned
    ptx = compile_launches(planned)
    assert list(ptx) == ["shrink_kernel", "gate_kernel", "expand_kernel"]
    is_half = factor_type != torch.float32
    assert ["mma.sync" in ptx[name] for name in ("shrink_kernel", "expand_kernel")] == [is_half, is_half]


@pytest.mark.parametrize("in_features", [1, 64, 14336])
def test_kernels_compile_for_any_number_of_splits(in_features: int) -> None:
    generator = Generator().manual_seed(0)
    units = UnitTable(in_features, 1)
    units.bind(0, draw_unit(4, in_features, 1, generator, torch.bfloat16))
    units.bind(1, draw_goat(40, 1, 2, in_features, 1, generator, torch.bfloat16))
    planned = triton_impl.launches(*activations(in_features, 1, torch.bfloat16), units, DeltaBatch.from_sets(SETS))
    assert len(compile_launches(planned)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_embeddings_kernels_compile(dtype: torch.dtype) -> None:
    units = UnitTable(100, 64)
    units.bind(0, draw_unit(4, 100, 64, Generator(), dtype))
    ids, y = torch.zeros(len(SETS), dtype=torch.int64), torch.zeros(len(SETS), 64, dtype=dtype)
    planned = triton_impl.embedding_launches(y, ids, units, DeltaBatch.from_sets(SETS), 2.0)
    assert list(compile_launches(planned)) == ["look_up_kernel", "expand_kernel"]
