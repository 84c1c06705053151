"""Adapter directories and bases made by hand, small enough to be broken in one place at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from motley_bases.spec import BaseSpec, GenerationDefaults
from torch import Tensor, nn
from transformers import PreTrainedModel

PREFIX = "base_model.model."
FINGERPRINT = f"sha256:{'0' * 64}"
PLAIN_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}


def tiny_spec(**fields: Any) -> BaseSpec:
    """Return a base of one layer that exists on paper alone."""
    facts: dict[str, Any] = {
        "name": "paper",
        "architecture": "PaperForCausalLM",
        "fingerprint": FINGERPRINT,
        "dtype": "float32",
        "vocab_size": 11,
        "hidden_size": 4,
        "context_length": 64,
        "layers": (),
        "linears": {
            "model.layers.0.self_attn.q_proj": (4, 6),
            "model.layers.0.self_attn.k_proj": (4, 2),
            "model.layers.0.mlp.up_proj": (4, 8),
            "lm_head": (4, 11),
        },
        "embedding_path": "model.embed_tokens",
        "lm_head_path": "lm_head",
        "other_modules": frozenset({"", "model", "model.layers.0.mlp.experts", "model.norm"}),
        "generation": GenerationDefaults(eos_token_ids=(0,)),
        "tied_embeddings": False,
        "has_chat_template": False,
    }
    return BaseSpec(**(facts | fields))


def spec_of(model: PreTrainedModel) -> BaseSpec:
    """Return the facts of a model that was never saved."""
    linears = {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    others = frozenset(path for path, _ in model.named_modules()) - linears.keys() - {"model.embed_tokens"}
    return tiny_spec(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        linears=linears,
        other_modules=others,
        tied_embeddings=bool(model.config.tie_word_embeddings),
    )


def plain_tensors() -> dict[str, Tensor]:
    """Return the tensors that go with PLAIN_CONFIG on the paper base."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (2, 4),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (6, 2),
        "model.layers.0.mlp.up_proj.lora_A.weight": (2, 4),
        "model.layers.0.mlp.up_proj.lora_B.weight": (8, 2),
    }
    return {f"{PREFIX}{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(
    directory: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Write an adapter's directory; what is not given is plain."""
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN_CONFIG if config is None else config))
    content = safetensors.torch.save(plain_tensors() if tensors is None else tensors)
    (directory / "adapter_model.safetensors").write_bytes(content)
    if manifest is not None:
        (directory / "motley_manifest.json").write_text(json.dumps(manifest))
    return directory
