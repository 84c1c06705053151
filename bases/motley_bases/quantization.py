"""Quantized Linears: which ways there are, what a checkpoint says of them, and what a loaded model is held to.

The weights are bitsandbytes', put in place by transformers' own quantizer; both are imported on use. Embeddings and
lm_head stay whole. Knows modules and configs, nothing of adapters. Runs on the thread that loads the base.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError

NONE = "none"
AUTO = "auto"
METHODS = ("nf4", "int8")
BLOCK_WEIGHTS = 64  # weights that share a scale in NF4
BLOCK_SCALES = 256  # scales that share a scale of their own
NEEDED_PACKAGES = ("bitsandbytes", "accelerate")
METHOD_OF_CLASS = {
    "Linear4bit": "nf4",
    "ServedLinear4bit": "nf4",
    "Linear8bitLt": "int8",
    "ServedLinear8bit": "int8",
}
CONFIG_FIELD = "quantization_config"


def stored_quantization(quantization_config: object) -> str:
    """Return how a checkpoint's Linears are stored, from a config without faults: none, nf4 or int8."""
    if quantization_config is None:
        return NONE
    return "nf4" if isinstance(quantization_config, Mapping) and quantization_config.get("load_in_4bit") else "int8"


def quantization_faults(quantization_config: object) -> Iterator[tuple[str, str]]:
    """Yield (field, sentence) of everything in a checkpoint's config that is not NF4 or INT8 as served here."""
    if quantization_config is None:
        return
    stored = quantization_config if isinstance(quantization_config, Mapping) else {}
    if stored.get("quant_method") != "bitsandbytes":
        yield CONFIG_FIELD, f"{stored.get('quant_method')!r} is not served: only NF4 and INT8 of bitsandbytes are"
    is_4bit, is_8bit = (stored.get(f"load_in_{bits}bit", False) for bits in (4, 8))
    if (is_4bit, is_8bit) not in ((True, False), (False, True)):
        yield CONFIG_FIELD, "its config says neither 4 nor 8 bits"
    wanted: dict[str, tuple[object, object]] = {"llm_int8_enable_fp32_cpu_offload": (False, False)}
    if is_4bit:
        wanted |= {"bnb_4bit_quant_type": ("fp4", "nf4"), "bnb_4bit_quant_storage": ("uint8", "uint8")}
    else:
        wanted |= {"llm_int8_has_fp16_weight": (False, False)}
    for name, (default, served) in wanted.items():
        if (found := stored.get(name, default)) != served:
            yield f"{CONFIG_FIELD}.{name}", f"its {name} is {found!r}, where only {served!r} is served"
    skipped = stored.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        yield f"{CONFIG_FIELD}.llm_int8_skip_modules", "its llm_int8_skip_modules is not a list of names"


def choose_quantization(asked: str, stored: str) -> str:
    """Resolve what is asked for against how the checkpoint is stored; auto takes it as it is.

    Raises: UnsupportedBaseError if a quantized checkpoint would have to become something else, or the setting is none.
    """
    if asked not in (AUTO, NONE, *METHODS):
        raise UnsupportedBaseError(
            f"quantize {asked!r} is none of {', '.join((AUTO, NONE, *METHODS))}", reason="QUANTIZE", field="quantize"
        )
    if asked in (AUTO, stored):
        return stored
    if stored != NONE:
        raise UnsupportedBaseError(
            f"the checkpoint is stored as {stored}, and cannot be served as {asked}",
            reason="QUANTIZED_OTHERWISE",
            field="quantize",
        )
    return asked


def require_quantizer() -> None:
    """Import what quantizes, quietly.

    Effects: silences what bitsandbytes says of a product that is never used here.
    Raises: UnsupportedBaseError with the package that is not installed.
    """
    for package in NEEDED_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UnsupportedBaseError(
                f"a quantized base needs {package}, which is not installed: pip install 'motley[server]'",
                reason="NO_QUANTIZER",
                field="quantize",
            )
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    importlib.import_module("bitsandbytes")


def quantizer_config(method: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers' quantizer is told.

    Semantics: NF4 keeps the scales themselves in 8 bits (double quantization). The threshold is for whoever else reads
    a checkpoint written so: with one, bitsandbytes lets an outlier in one row change the others.
    """
    make: Any = BitsAndBytesConfig
    if method == "nf4":
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_threshold=0.0,
        )
    else:
        config = make(load_in_8bit=True, llm_int8_threshold=0.0, bnb_4bit_compute_dtype=dtype)
    assert isinstance(config, BitsAndBytesConfig)
    return config


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a Linear's weight is quantized."""
    return isinstance(module, nn.Linear) and _method_of(module) is not None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a Linear of the checkpoint, quantized or not.

    Semantics: the quantizer makes Linears of Conv1D too; what takes an adapter must not depend on it.
    """
    return isinstance(module, nn.Linear) and getattr(module, "source_cls", nn.Linear) is nn.Linear


def settle(model: PreTrainedModel, method: str, dtype: torch.dtype) -> None:
    """Bind the quantized Linears of a model just loaded to products that round nothing more, and check what they hold.

    Effects: must come before the first forward pass. What a stored checkpoint holds in another type than `dtype` is
    held in that from now on, for transformers leaves it as it was stored. Without all this, bitsandbytes rounds NF4
    scales to bfloat16 in place on CPUs that multiply bfloat16, after which nothing can be saved or trained, takes
    another NF4 product on CUDA as a batch grows, and rounds activations for INT8.
    Raises: UnreadableBaseError for a tensor of a wrong shape or type, or scales that are no NF4 of ours.
    """
    from motley_bases.served_linears import ServedLinear4bit, ServedLinear8bit

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for path, linear in quantized_linears(model):
        found = _method_of(linear)
        if found != method:
            raise _broken(path, f"is stored as {found}, and the checkpoint says {method}")
        if method == "nf4":
            _check_nf4(path, linear)
            linear.weight.quant_state.dtype = dtype  # what the weight is expanded to, and its inputs are taken for
            linear.__class__ = ServedLinear4bit  # the same state; only the product is another
        else:
            _check_int8(path, linear)
            linear.__class__ = ServedLinear8bit


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the module of every quantized Linear."""
    return ((path, module) for path, module in model.named_modules() if is_quantized(module))


def linear_bytes(method: str, in_features: int, out_features: int, *, is_nested: bool = True) -> int:
    """Return the bytes of one quantized weight with its scales and tables, its bias not counted.

    Semantics: `is_nested` is NF4's double quantization, as `quantizer_config` asks for it; without it the scales are
    float32.
    """
    if method == "int8":
        return in_features * out_features + 4 * out_features
    num_scales = -(-in_features * out_features // BLOCK_WEIGHTS)
    num_weight_bytes = -(-in_features * out_features // 2)
    if not is_nested:
        return num_weight_bytes + 4 * num_scales + 4 * 16
    num_outer = -(-num_scales // BLOCK_SCALES)
    tables = 4 * (16 + BLOCK_SCALES + 1)  # NF4's 16 values, the 256 of the scales, their offset
    return num_weight_bytes + num_scales + 4 * num_outer + tables


def _method_of(linear: nn.Module) -> str | None:
    """Name the way by the class: asking by name imports nothing where nothing is quantized."""
    return METHOD_OF_CLASS.get(type(linear).__name__)


def _check_nf4(path: str, linear: Any) -> None:
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        raise _broken(path, "has no scales")
    num_weights = linear.in_features * linear.out_features
    num_scales = -(-num_weights // BLOCK_WEIGHTS)
    if (state.quant_type, state.blocksize) != ("nf4", BLOCK_WEIGHTS):
        raise _broken(path, f"is {state.quant_type!r} in blocks of {state.blocksize}, not nf4 in {BLOCK_WEIGHTS}s")
    if tuple(state.shape) != (linear.out_features, linear.in_features):
        raise _broken(path, f"says it is {list(state.shape)}, not {[linear.out_features, linear.in_features]}")
    _check_tensor(path, "weight", linear.weight, torch.uint8, -(-num_weights // 2))
    _check_tensor(path, "absmax", state.absmax, torch.uint8 if state.nested else torch.float32, num_scales)
    _check_tensor(path, "quant_map", state.code, torch.float32, 16)
    if state.nested:
        if state.state2.blocksize != BLOCK_SCALES:
            raise _broken(path, f"has scales in blocks of {state.state2.blocksize}, not {BLOCK_SCALES}")
        _check_tensor(path, "nested_absmax", state.state2.absmax, torch.float32, -(-num_scales // BLOCK_SCALES))
        _check_tensor(path, "nested_quant_map", state.state2.code, torch.float32, BLOCK_SCALES)
        _check_tensor(path, "nested_offset", state.offset, torch.float32, 1)


def _check_int8(path: str, linear: Any) -> None:
    shape = (linear.out_features, linear.in_features)
    if tuple(linear.weight.shape) != shape:
        raise _broken(path, f"is {list(linear.weight.shape)}, not {list(shape)}")
    _check_tensor(path, "weight", linear.weight, torch.int8, shape[0] * shape[1])
    _check_tensor(path, "SCB", getattr(linear.weight, "SCB", None), torch.float32, linear.out_features)


def _check_tensor(path: str, name: str, tensor: object, dtype: torch.dtype, numel: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise _broken(path, f"has no {name}")
    if tensor.dtype != dtype or tensor.numel() != numel:
        found = f"{tensor.numel()} of {str(tensor.dtype).removeprefix('torch.')}"
        raise _broken(path, f"has {found} in {name}, not {numel} of {str(dtype).removeprefix('torch.')}")


def _broken(path: str, what: str) -> UnreadableBaseError:
    return UnreadableBaseError(f"the quantized {path} {what}", reason="BROKEN_QUANTIZATION", field=path)
