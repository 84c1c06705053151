"""The loader: from a checkpoint directory to a probed, described base with adapter sites in place.

It reads local safetensors only and never runs a checkpoint's own code. Runs once, on the thread that starts the server.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from motley_bases.admission import check_config, check_stored_config
from motley_bases.attention import register_attention
from motley_bases.base import Base
from motley_bases.base_record import resolve_fingerprint
from motley_bases.checkpoint import has_weights, read_config, resolve_base, weight_files
from motley_bases.describe import describe
from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.fingerprint import fingerprint, stored_dtypes
from motley_bases.generation import read_generation
from motley_bases.linear import attach
from motley_bases.packing import can_pack, pack_linears
from motley_bases.probe import probe
from motley_bases.progress_bars import without_progress_bars
from motley_bases.pruned import read_bound_manifest, register_pruned
from motley_bases.quantization import (
    AUTO,
    CONFIG_FIELD,
    NONE,
    choose_quantization,
    quantizer_config,
    require_quantizer,
    settle,
    stored_quantization,
)
from motley_bases.refusing import refusing
from motley_bases.spec import BaseSpec
from motley_bases.weight_formats import check_row_by_row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

__all__ = ["load_base", "resolve_base"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class PlainBase:
    """A base whose Linears are its own: probed and described, frozen and in evaluation mode."""

    spec: BaseSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(
    directory: Path, *, dtype: str, device: torch.device, quantize: str = AUTO, cache_directory: Path | None = None
) -> Base:
    """Load, probe and describe a base, and put adapter sites in place: as `load_plain_base`, for a server."""
    plain = load_plain_base(directory, dtype=dtype, device=device, quantize=quantize, cache_directory=cache_directory)
    sites = attach(plain.model, plain.spec)
    if can_pack(device, plain.model.dtype):
        pack_linears(plain.model)
    return Base(plain.spec, plain.model, plain.tokenizer, sites)


def load_plain_base(
    directory: Path,
    *,
    dtype: str,
    device: torch.device,
    quantize: str = AUTO,
    name: str = "",
    cache_directory: Path | None = None,
) -> PlainBase:
    """Load, probe and describe a base.

    Semantics: dtype is auto, float32, bfloat16 or float16; auto is the checkpoint's own (see `choose_dtype`).
    quantize is auto, none, nf4 or int8; auto is as the checkpoint is stored. Without a `name` it has its directory's.
    `cache_directory` remembers fingerprints.
    Raises: UnreadableBaseError if the checkpoint is broken; UnsupportedBaseError if it would be served wrongly, with
    the config field at fault.
    """
    register_pruned()
    check_stored_config(read_config(directory))
    config = read_parsed_config(directory)
    check_config(config)
    stored_generation = read_generation(directory)
    stored = stored_quantization(getattr(config, CONFIG_FIELD, None))
    quantization = choose_quantization(quantize, stored)
    digest = resolve_fingerprint(directory, fingerprint(directory, cache_directory=cache_directory), stored)
    manifest = read_bound_manifest(directory, config, digest)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, choose_dtype(dtype, directory, config, device), device, quantization)
    register_attention()
    report = probe(model)
    spec = describe(model, tokenizer, report, stored_generation, name=name or directory.name, fingerprint=digest)
    pruned_from = None if manifest is None else manifest.original_fingerprint
    return PlainBase(replace(spec, quantization=quantization, pruned_from=pruned_from), model, tokenizer)


def choose_dtype(dtype: str, directory: Path, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """Resolve a dtype setting against the checkpoint and the device.

    Semantics: auto is the dtype the config names, or else the one most of the stored bytes have; but a float16
    checkpoint is served in float32 on a CPU.
    Raises: UnsupportedBaseError for a name or a stored dtype that cannot be computed with.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise UnsupportedBaseError(
            f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}", reason="DTYPE", field="dtype"
        )
    chosen = stored_dtype(directory, config)
    if chosen is torch.float16 and device.type == "cpu":
        # CPUs compute float16 by conversion, slower than float32, and it overflows at 65504.
        logger.info("serving a float16 checkpoint in float32: on a CPU float16 is slower and overflows")
        return torch.float32
    return chosen


def stored_dtype(directory: Path, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype that the config names, or else the one most of the stored bytes have.

    Raises: UnsupportedBaseError for one that cannot be computed with, or if nothing tells.
    """
    chosen = told = config.dtype
    if chosen is None:
        if not has_weights(directory):
            raise _no_dtype(
                f"{directory / 'config.json'} names no dtype, and no weights lie beside it to tell: "
                f"name one of {', '.join(DTYPES)}"
            )
        stored = stored_dtypes(weight_files(directory))
        told = max(stored, key=stored.__getitem__, default=None)
        chosen = STORED_DTYPES.get(str(told))
    if chosen not in DTYPES.values():
        raise _no_dtype(f"the checkpoint's dtype {told} is none of {', '.join(DTYPES)}")
    return cast(torch.dtype, chosen)


def _no_dtype(message: str) -> UnsupportedBaseError:
    return UnsupportedBaseError(message, reason="DTYPE", field="dtype")


def read_parsed_config(directory: Path) -> PreTrainedConfig:
    """Read the config as transformers understands it.

    Raises: UnreadableBaseError with reason BROKEN_CONFIG.
    """
    with refusing(f"{directory / 'config.json'} is refused by transformers", "BROKEN_CONFIG"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int | None):  # the one number the checks need whose type transformers leaves open
        raise UnreadableBaseError(
            f"{directory / 'config.json'} has sliding_window {window!r}, not a whole number",
            reason="BROKEN_CONFIG",
            field="sliding_window",
        )
    return cast(PreTrainedConfig, config)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Read the fast tokenizer.

    Raises: UnreadableBaseError with reason BROKEN_TOKENIZER or NO_TOKENIZER.
    """
    with refusing(f"the tokenizer in {directory} cannot be read", "BROKEN_TOKENIZER"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UnreadableBaseError(f"the tokenizer in {directory} is not a fast one", reason="NO_TOKENIZER")
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_model(directory: Path, dtype: torch.dtype, device: torch.device, quantization: str) -> PreTrainedModel:
    """Read the weights onto a device, quantize them if asked to, and insist that they are exactly the model's.

    Raises: UnreadableBaseError for other weights; UnsupportedBaseError if what quantizes is not installed, or for INT8
    weights in another order than row by row.
    """
    keywords: dict[str, object] = {}
    if quantization != NONE:
        require_quantizer()
        # Straight onto the device: quantized weights that are moved afterwards lose their scales.
        keywords["device_map"] = {"": device}
        if CONFIG_FIELD not in read_config(directory):
            keywords["quantization_config"] = quantizer_config(quantization, dtype)
        elif quantization == "int8":
            check_row_by_row(weight_files(directory))
    with without_progress_bars(), refusing(f"{directory} cannot be built into a model", "MODEL_CONSTRUCTION"):
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported below, and refused like the others
            **keywords,
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(entry) for entry in info[kind])
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UnreadableBaseError(
                f"the weights in {directory} do not fit {type(model).__name__}: {kind}: {shown}",
                reason="OTHER_WEIGHTS",
                field=kind,
            )
    if quantization != NONE:
        settle(model, quantization, dtype)
    else:
        nn.Module.to(model, device)
    model.train(False).requires_grad_(False)
    return cast(PreTrainedModel, model)
