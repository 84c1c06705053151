"""Writing a LoRA directory that PEFT loads as it is: one rank and one scale per module.

PEFT divides alpha by the module's own rank, so every module gets both patterns, each under its whole path. It checks
nothing; what it writes is read back through the one door. Writing blocks; any thread but the event loop's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from motley_adapters.formats import CONFIG_FILE, TENSOR_FILE

_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False, slots=True)
class LoraPair:
    """One Linear's factors as PEFT stores them, and what their product is multiplied by.

    Shapes: a [R, I], b [O, R].
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Return R."""
        return self.a.shape[0]


def write_peft_lora(directory: Path, pairs: Mapping[str, LoraPair], *, dtype: torch.dtype | None = None) -> None:
    """Write factors by module path; `dtype` is how they are stored, as they are by default."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, pair in sorted(pairs.items()):
        for name, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
            stored = factor.detach().to("cpu", factor.dtype if dtype is None else dtype)
            tensors[f"{_PREFIX}{path}.{name}.weight"] = stored.contiguous()
    ranks = {_anchored(path): pair.rank for path, pair in sorted(pairs.items())}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "target_modules": sorted(pairs),
        "rank_pattern": ranks,
        "alpha_pattern": {_anchored(path): _whole(pair.scale * pair.rank) for path, pair in sorted(pairs.items())},
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }
    save_file(tensors, directory / TENSOR_FILE, {"format": "pt"})
    (directory / CONFIG_FILE).write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")


def _anchored(path: str) -> str:
    # PEFT reads a key as an expression that may begin after any dot: unescaped, a dot would also match `layers_1`.
    return f"^{re.escape(path)}"


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha
