"""A base with weights that a seed draws, in the place of those that it has: what a training from scratch begins from.

Architecture, tokenizer and dtype are the original's; how large weights are drawn is transformers' own. Runs on the
thread that trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from motley_bases.loader import read_parsed_config, stored_dtype
from motley_bases.refusing import refusing
from transformers import AutoModelForCausalLM

from motley_trainer.pruning.dense_copy import write_dense
from motley_trainer.spec.settings import derived_seed


def write_drawn(directory: Path, *, original: Path, seed: int) -> str:
    """Fill a directory with a base of an original's architecture, and return its fingerprint.

    Semantics: drawn on the CPU, so that the machine's accelerator makes no difference; no shared generator is drawn
    from.
    """
    config = read_parsed_config(original)
    with torch.random.fork_rng(devices=[]), refusing(f"{original} cannot be built into a model", "MODEL_CONSTRUCTION"):
        torch.manual_seed(derived_seed(seed, "scratch"))
        model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    return write_dense(directory, model, original=original, dtype=stored_dtype(original, config))
