"""Every kernel of the Triton paged attention, in every configuration that a launch can ask for, compiles for sm_90."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compiled_kernels import SHARED_BYTES, compile_kernel
from motley_kernels.paged_attention import triton_impl
from motley_kernels.paged_attention.tiles import SPAN_KEYS
from motley_kernels.testing import draw_paged_case
from torch import Generator

SHAPES = [  # query heads, key-value heads, head size, soft cap
    (2, 2, 16, None),
    (12, 4, 64, None),
    (8, 8, 80, 30.0),
    (8, 2, 128, None),
    (32, 1, 128, 30.0),  # more heads to a key than a tile for few queries has rows
    (8, 4, 256, None),
    (8, 4, 256, 50.0),
]


def compile_launches(dtype: torch.dtype, shape: tuple[int, int, int, float | None]) -> list[str]:
    """Compile what a batch with a split decode and a prompt launches, and name the kernels."""
    num_heads, num_kv_heads, head_dim, softcap = shape
    case = draw_paged_case(
        (1, 40),
        (SPAN_KEYS, 3),
        Generator().manual_seed(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    planned = triton_impl.launches(
        *(torch.empty_like(case.q), case.q, case.k, case.v, case.kv, case.batch),
        scale=head_dim**-0.5,
        sliding_window=None,
        softcap=softcap,
    )
    for launch in planned:
        compiled = compile_kernel(launch.kernel, launch.arguments, launch.constants, launch.options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_BYTES, launch.kernel.__name__
    return [launch.kernel.__name__ for launch in planned]


@pytest.fixture(autouse=True)
def _compile_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_compile_for_half_precision(dtype: torch.dtype, shape: tuple[int, int, int, float | None]) -> None:
    assert compile_launches(dtype, shape) == ["store", "attend", "join", "attend"]


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[-1]], ids=str)
def test_kernels_compile_for_exact_products(shape: tuple[int, int, int, float | None]) -> None:
    assert compile_launches(torch.float32, shape) == ["store", "attend", "join", "attend"]
