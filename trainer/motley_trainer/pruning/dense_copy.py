"""A base with other weights of the same shapes, as files: what single weights were set to zero in.

Everything but the weights is the original's. Runs on the calling thread.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from motley_bases.fingerprint import fingerprint
from motley_bases.progress_bars import without_progress_bars
from torch import nn
from transformers import PreTrainedModel

from motley_trainer.files.outputs import GENERATION_FILE, TOKENIZER_FILES

_CONFIG_FILE = "config.json"


def write_dense(directory: Path, model: PreTrainedModel, *, original: Path, dtype: torch.dtype) -> str:
    """Fill a directory with a base, and return its fingerprint.

    Effects: the model's weights have `dtype` from now on.
    """
    nn.Module.to(model, dtype)
    with without_progress_bars():
        model.save_pretrained(directory)
    (directory / GENERATION_FILE).unlink(missing_ok=True)  # made from the config; what counts is what the original says
    for name in (_CONFIG_FILE, *TOKENIZER_FILES, GENERATION_FILE):
        if (original / name).is_file():
            shutil.copyfile(original / name, directory / name)
    return fingerprint(directory)
