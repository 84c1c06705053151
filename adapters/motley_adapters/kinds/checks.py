"""What every kind checks of modules and tensors, each error naming the tensor or field.

Pure functions over the base's facts and tensors that were already read. Any thread.
"""

from __future__ import annotations

import torch
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta import DeltaUnit
from torch import Tensor

from motley_adapters.errors import AdapterFormatError, AdapterMismatchError
from motley_adapters.formats import show
from motley_adapters.tensor_file import LARGEST_WEIGHT

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def module_error(path: str, base: BaseSpec, field: str) -> AdapterMismatchError:
    """Say why a path is no module that an adapter can be attached to."""
    if path in base.other_modules:
        message = f"{path} is not a Linear of {base.name} ({base.architecture}), so it takes no adapter"
        return AdapterMismatchError(message, reason="NOT_A_LINEAR", field=field)
    message = f"{base.name} ({base.architecture}) has no module {show(path)}"
    return AdapterMismatchError(message, reason="UNKNOWN_MODULE", field=field)


def check_linear(path: str, base: BaseSpec, field: str, kind: str) -> tuple[int, int]:
    """Return the (in, out) features of a Linear that a kind adapts.

    Raises: AdapterMismatchError with reason WRONG_MODULE_KIND for the embedding, NOT_A_LINEAR or UNKNOWN_MODULE.
    """
    if path == base.embedding_path:
        message = f"{path} is an embedding, and the kind {kind} adapts Linears"
        raise AdapterMismatchError(message, reason="WRONG_MODULE_KIND", field=field)
    if path not in base.linears:
        raise module_error(path, base, field)
    return base.linears[path]


def take_tensor(tensors: dict[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """Remove a tensor of the given dtypes from those that were read.

    Raises: AdapterFormatError with reason MISSING_TENSOR or BAD_DTYPE.
    """
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise AdapterFormatError(f"{name} is missing", reason="MISSING_TENSOR", field=name)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        message = f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}, it must be {wanted}"
        raise AdapterFormatError(message, reason="BAD_DTYPE", field=name)
    return tensor


def refuse_others(tensors: dict[str, Tensor], kind: str) -> None:
    """Refuse what was read and never taken.

    Raises: AdapterFormatError with reason UNEXPECTED_TENSOR.
    """
    if tensors:
        name = min(tensors)
        message = f"{name} belongs to no module that motley_manifest.{kind} names"
        raise AdapterFormatError(message, reason="UNEXPECTED_TENSOR", field=name)


def check_factor(name: str, tensor: Tensor, expected: tuple[int, int], *, rank_axis: int, source: str) -> None:
    """Hold one low-rank factor against the base's side and the rank that `source` says.

    Raises: AdapterMismatchError with reason SHAPE_MISMATCH; AdapterFormatError with reason RANK_MISMATCH.
    """
    if tensor.ndim != 2 or tensor.shape[1 - rank_axis] != expected[1 - rank_axis]:
        raise shape_error(name, expected, tensor)
    if tensor.shape[rank_axis] != expected[rank_axis]:
        actual, wanted = tensor.shape[rank_axis], expected[rank_axis]
        message = f"{name} has rank {actual}, but {source} to {wanted}: its scale would be wrong"
        raise AdapterFormatError(message, reason="RANK_MISMATCH", field=name)


def check_products(name: str, unit: DeltaUnit) -> None:
    """Refuse a scale that makes of sound factors what no device could hold.

    Semantics: the scale times any weight, or times two weights that meet along one rank, stays within LARGEST_WEIGHT.
    Raises: AdapterFormatError with reason WEIGHT_TOO_LARGE.
    """
    assert unit.a is not None
    assert unit.b is not None
    a, b = (_largest_by_rank(factor) for factor in (unit.a, unit.b))
    largest = abs(unit.scaling) * float(torch.stack((a * b, a, b)).max())
    if not largest <= LARGEST_WEIGHT:
        message = f"{name} becomes {largest:g} at a scale of {unit.scaling:g}, and no weight may be beyond"
        raise AdapterFormatError(f"{message} {LARGEST_WEIGHT:g}", reason="WEIGHT_TOO_LARGE", field=name)


def _largest_by_rank(factor: Tensor) -> Tensor:
    low, high = factor.aminmax(dim=1)  # unlike abs(), it makes no copy
    return torch.maximum(-low, high).to(torch.float64)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise AdapterMismatchError with reason SHAPE_MISMATCH unless a tensor has this shape."""
    if tuple(tensor.shape) != expected:
        raise shape_error(name, expected, tensor)


def shape_error(name: str, expected: tuple[int, ...], tensor: Tensor, hint: str = "") -> AdapterMismatchError:
    """Say which shape a tensor should have."""
    message = f"{name} has shape {list(tensor.shape)}, the base takes {list(expected)}{hint}"
    return AdapterMismatchError(message, reason="SHAPE_MISMATCH", field=name)
