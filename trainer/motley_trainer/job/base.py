"""The bases of a job: loaded as they are served or trained, described, and without a server's parts in their Linears.

The weights and products are those that are served (`motley_bases`); attention is transformers' own, since training
needs gradients through it. Runs on the thread that owns the model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from motley_bases.errors import UnsupportedBaseError
from motley_bases.loader import PlainBase, load_plain_base, read_parsed_config, stored_dtype
from motley_bases.pruned import register_pruned
from motley_bases.quantization import AUTO
from transformers import PreTrainedModel

from motley_trainer.errors import SettingsError


def load_job_base(directory: Path, *, name: str, dtype: str, device: torch.device, quantization: str) -> PlainBase:
    """Load a base, and describe it as a server does.

    Semantics: `dtype` is auto, float32 or bfloat16; where auto is float16, it is computed in float32, as gradients
    leave float16's range.
    Raises: BaseError for what a server would refuse too; SettingsError with reason BAD_SPEC for a quantization that the
    checkpoint cannot be held in.
    """
    register_pruned()
    try:
        base = load_plain_base(
            directory, dtype=_trainable(dtype, directory), device=device, quantize=quantization or AUTO, name=name
        )
    except UnsupportedBaseError as error:
        if error.field != "quantize":
            raise
        raise SettingsError(error.message, reason="BAD_SPEC", field="quantization") from error
    _set_attention(base.model)
    return base


class HeldBase:
    """One base at a time: the last that was asked for."""

    def __init__(self, *, name: str, dtype: str, device: torch.device, on_load: Callable[[], None]) -> None:
        self._name = name
        self._dtype = dtype
        self._device = device
        self._on_load = on_load
        self._key: tuple[Path, str] | None = None
        self._base: PlainBase | None = None

    def hold(self, directory: Path, quantization: str) -> PlainBase:
        """Return a base in a quantization, as it was left if it is the one that is held; else the other is let go.

        Effects: calls `on_load` before a base is loaded.
        """
        if self._base is None or self._key != (directory, quantization):
            self.let_go()
            self._on_load()
            self._base = load_job_base(
                directory, name=self._name, dtype=self._dtype, device=self._device, quantization=quantization
            )
            self._key = directory, quantization
        return self._base

    def let_go(self) -> None:
        """Hold none."""
        if self._base is None:
            return
        self._base = None
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU


def _trainable(dtype: str, directory: Path) -> str:
    is_half = dtype == "auto" and stored_dtype(directory, read_parsed_config(directory)) is torch.float16
    return "float32" if is_half else dtype


def _set_attention(model: PreTrainedModel) -> None:
    """Choose transformers' fastest attention that means the same: a soft cap is explicit arithmetic alone."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if softcap is None and model._supports_sdpa else "eager")
