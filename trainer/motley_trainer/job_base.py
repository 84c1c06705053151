"""The base of a job: loaded as it is served or trained, described, and without a server's parts in its Linears.

The weights and products are those that are served (`motley_bases`); attention is transformers' own, since training
needs gradients through it. Runs on the thread that owns the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from motley_bases.admission import check_config, check_stored_config
from motley_bases.attention import register_attention
from motley_bases.base_record import resolve_fingerprint
from motley_bases.checkpoint import read_config
from motley_bases.describe import describe
from motley_bases.errors import UnsupportedBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.generation import read_generation
from motley_bases.loader import choose_dtype, load_model, load_tokenizer, read_parsed_config
from motley_bases.probe import probe
from motley_bases.pruned import read_bound_manifest, register_pruned
from motley_bases.quantization import AUTO, CONFIG_FIELD, choose_quantization, stored_quantization
from motley_bases.spec import BaseSpec
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from motley_trainer.errors import SettingsError


@dataclass(frozen=True, eq=False, slots=True)
class JobBase:
    """A base with plain Linears, frozen and in evaluation mode."""

    spec: BaseSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_job_base(directory: Path, *, name: str, dtype: str, device: torch.device, quantization: str) -> JobBase:
    """Load a base, and describe it as a server does.

    Semantics: `dtype` is auto, float32 or bfloat16; where auto is float16, it is computed in float32, as gradients
    leave float16's range.
    Raises: BaseError for what a server would refuse too; SettingsError with reason BAD_SPEC for a quantization that the
    checkpoint cannot be held in.
    """
    register_pruned()
    check_stored_config(read_config(directory))
    config = read_parsed_config(directory)
    check_config(config)
    stored = stored_quantization(getattr(config, CONFIG_FIELD, None))
    quantization = _chosen(quantization, stored)
    digest = resolve_fingerprint(directory, fingerprint(directory), stored)
    manifest = read_bound_manifest(directory, config, digest)
    tokenizer = load_tokenizer(directory)
    chosen = choose_dtype(dtype, directory, config, device)
    computed = torch.float32 if chosen is torch.float16 else chosen
    model = load_model(directory, computed, device, quantization)
    register_attention()
    report = probe(model)
    _set_attention(model)
    spec = describe(model, tokenizer, report, read_generation(directory), name=name, fingerprint=digest)
    pruned_from = None if manifest is None else manifest.original_fingerprint
    return JobBase(replace(spec, quantization=quantization, pruned_from=pruned_from), model, tokenizer)


def _chosen(asked: str, stored: str) -> str:
    try:
        return choose_quantization(asked or AUTO, stored)
    except UnsupportedBaseError as error:
        raise SettingsError(error.message, reason="BAD_SPEC", field="quantization") from error


def _set_attention(model: PreTrainedModel) -> None:
    """Choose transformers' fastest attention that means the same: a soft cap is explicit arithmetic alone."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if softcap is None and model._supports_sdpa else "eager")
