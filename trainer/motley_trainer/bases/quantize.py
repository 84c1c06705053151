"""Quantized checkpoints: a base written with its Linears in NF4 or INT8, to be loaded without the one it was made of.

The arithmetic and the check of the result are the bases'. Runs on the calling thread, on the CPU: which code a weight
gets must not depend on the machine's accelerator.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from motley_bases.admission import check_config, check_stored_config
from motley_bases.base_record import BaseRecord, write_base_record
from motley_bases.checkpoint import read_config, weight_files
from motley_bases.fingerprint import fingerprint
from motley_bases.loader import load_base, load_model, read_parsed_config, stored_dtype
from motley_bases.progress_bars import without_progress_bars
from motley_bases.prune_manifest import MANIFEST_FILE
from motley_bases.pruned import read_bound_manifest, register_pruned
from motley_bases.quantization import CONFIG_FIELD, METHODS
from transformers import PreTrainedModel

from motley_trainer.errors import SettingsError, UnsuitableBaseError
from motley_trainer.files.outputs import GENERATION_FILE, TOKENIZER_FILES, new_directory
from motley_trainer.progress import Unwatched, Watcher

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class QuantizedBase:
    """What was written. Units: bytes of the files that hold weights."""

    original_fingerprint: str
    stored_fingerprint: str
    original_bytes: int
    stored_bytes: int


def quantize_base(directory: Path, method: str, out: Path, *, watcher: Watcher | None = None) -> QuantizedBase:
    """Write a base with its Linears quantized, embedding and lm_head whole.

    Semantics: weights are quantized from the dtype they are stored in. What is written is loaded and probed before it
    is shown, so it needs the memory of one base at a time and serves as it is.
    Effects: writes the directory `out`, in one rename.
    Raises: SettingsError for another method; UnsuitableBaseError with reason ALREADY_QUANTIZED; OutputError; BaseError
    if the base cannot be served.
    """
    watcher = watcher or Unwatched()
    if method not in METHODS:
        message = f"method {method!r} is none of {', '.join(METHODS)}"
        raise SettingsError(message, reason="METHOD", field="method")
    register_pruned()
    stored_config = read_config(directory)
    check_stored_config(stored_config)
    config = read_parsed_config(directory)
    check_config(config)
    if stored_config.get(CONFIG_FIELD) is not None:
        message = f"{directory} is quantized already; quantize the checkpoint that it was made of"
        raise UnsuitableBaseError(message, reason="ALREADY_QUANTIZED", field=CONFIG_FIELD)
    with new_directory(out) as aside:
        watcher.begin("reading the base", 1)
        original = fingerprint(directory)
        read_bound_manifest(directory, config, original)
        watcher.begin(f"quantizing to {method}", 1)
        dtype = stored_dtype(directory, config)
        model = load_model(directory, dtype, CPU, method)
        watcher.begin("writing", 1)
        _write(model, directory, aside, dtype)
        del model
        stored = fingerprint(aside)
        write_base_record(aside, BaseRecord(original, stored, method))
        watcher.begin("checking what was written", 1)
        load_base(aside, dtype="auto", device=CPU)
    return QuantizedBase(original, stored, _weight_bytes(directory), _weight_bytes(out))


def _write(model: PreTrainedModel, original: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write weights, and beside them the original's files as they are, the config but for what is new in it."""
    with without_progress_bars():
        model.save_pretrained(directory)
    config = {**read_config(original)}
    config.pop("torch_dtype", None)  # what `dtype` was called before
    config["dtype"] = str(dtype).removeprefix("torch.")
    config[CONFIG_FIELD] = cast(Any, model.config).quantization_config.to_dict()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / GENERATION_FILE).unlink(missing_ok=True)  # made from the config; what counts is what the original says
    for name in (*TOKENIZER_FILES, GENERATION_FILE, MANIFEST_FILE):
        if (original / name).is_file():
            shutil.copyfile(original / name, directory / name)


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(directory))
