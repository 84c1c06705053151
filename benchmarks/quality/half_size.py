"""A base half as wide and half as deep as the subject, whose weights nobody has trained: to be trained from nothing.

The subject itself is too large to get anywhere from nothing in the minutes that a measurement has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from motley_bases.loader import load_tokenizer, read_parsed_config
from motley_bases.progress_bars import without_progress_bars
from subject import current
from transformers import AutoModelForCausalLM

_SIDES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def write_half_size(directory: Path) -> int:
    """Write it, with the subject's tokenizer, and return its hidden size; in bfloat16, as the embedded base is."""
    origin = current().directory
    config = read_parsed_config(origin)
    for side in _SIDES:
        setattr(config, side, getattr(config, side) // 2)
    model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    with without_progress_bars():
        model.save_pretrained(directory)
    load_tokenizer(origin).save_pretrained(directory)
    return int(config.hidden_size)
