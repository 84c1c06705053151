"""A pruned base as files: config, weights, manifest and the original's tokenizer.

Formats are the bases'. Runs on the calling thread.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from motley_bases.prune_manifest import PruneManifest, write_prune_manifest
from motley_bases.pruned import save_pruned
from transformers import PreTrainedConfig, PreTrainedModel

from motley_trainer.files.outputs import GENERATION_FILE, TOKENIZER_FILES
from motley_trainer.pruning.surgery import shapes_of


def write_pruned(
    directory: Path,
    model: PreTrainedModel,
    *,
    original: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    manifest: PruneManifest,
) -> str:
    """Fill a directory with a pruned base, and return its fingerprint.

    Semantics: `config` is the original's as it was read; weights are stored as `dtype`.
    """
    state = {name: tensor.to("cpu", dtype) for name, tensor in model.state_dict().items()}
    fingerprint = save_pruned(state, config, shapes_of(model), directory)
    (directory / GENERATION_FILE).unlink(missing_ok=True)  # made from the config; what counts is what the original says
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if (original / name).is_file():
            shutil.copyfile(original / name, directory / name)
    write_prune_manifest(directory, manifest)
    return fingerprint
