"""Compile Triton kernels for a GPU that is not there: what the interpreter accepts and the compiler refuses.

Needs a process in which TRITON_INTERPRET was not set when the kernel was decorated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 99 * 1024  # what a program may have on every card since sm_80
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, Tensor | int | float],
    constants: Mapping[str, int | bool],
    options: Mapping[str, int | bool],
) -> Any:
    """Compile a kernel for sm_90 as a launch with these arguments would, tensors taken as aligned."""
    signature = {name: "constexpr" if name in constants else _type(arguments[name]) for name in kernel.arg_names}
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name not in unspecialized and _is_aligned(arguments[name])
    }
    source = ASTSource(kernel, signature, dict(constants), aligned)
    return triton.compile(source, target=HOPPER, options=dict(options))


def _type(argument: Tensor | int | float) -> str:
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def _is_aligned(argument: Tensor | int | float) -> bool:
    return isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0)
