"""Pruned copies of random checkpoints, cut by a loop of their own, and the dense checkpoints that they must answer as.

Shares the file formats with what is tested, and no arithmetic: what is cut, and what is zeroed instead, is spelt out
here head by head and channel by channel.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from motley_bases.fingerprint import fingerprint
from motley_bases.prune_manifest import LayerKeep, PruneManifest, write_prune_manifest
from motley_bases.pruned import LayerShape, PrunedShapes, register_pruned, save_pruned
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Keeps = Sequence[LayerKeep | None]
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

# Three layers of 4 query heads, 2 key-value heads and 96 channels, as random checkpoints have them: one left whole, one
# that keeps its second key-value head, one that keeps its first.
GROUPED_KEEPS: Keeps = (None, LayerKeep(tuple(range(1, 96, 3)), (1,)), LayerKeep((0, 5, 6, *range(40, 77)), (0,)))
# The same with as many key-value heads as query heads.
MULTI_HEAD_KEEPS: Keeps = (
    LayerKeep(tuple(range(0, 96, 2)), (1, 3)),
    None,
    LayerKeep(tuple(range(30, 90)), (0, 1, 2)),
)


def random_keeps(num_layers: int, num_kv_heads: int, ffn_size: int, *, seed: int = 0) -> Keeps:
    """Draw what all layers but the first keep: three quarters of the channels, all key-value heads but one."""
    rng = random.Random(seed)
    drawn = (
        LayerKeep(
            tuple(sorted(rng.sample(range(ffn_size), ffn_size * 3 // 4))),
            tuple(sorted(rng.sample(range(num_kv_heads), num_kv_heads - 1))),
        )
        for _ in range(1, num_layers)
    )
    return (None, *drawn)


def prune_checkpoint(original: Path, directory: Path, keeps: Keeps, **manifest: Any) -> Path:
    """Write the pruned copy of a checkpoint, with its manifest, and return its directory."""
    model = load(original)
    state: dict[str, Tensor] = dict(model.state_dict())
    for layer, kept in enumerate(keeps):
        if kept is not None:
            _cut(state, f"model.layers.{layer}.", kept_rows(model, kept))
    save_pruned(state, model.config, shapes_of(model, keeps), directory)
    for name in BESIDE:
        if (original / name).exists():
            shutil.copy(original / name, directory / name)
    num_parameters = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in state.values()}.values())
    write_prune_manifest(directory, make_manifest(fingerprint(original), keeps, num_parameters, **manifest))
    return directory


def zero_checkpoint(original: Path, directory: Path, keeps: Keeps) -> Path:
    """Write the dense copy of a checkpoint in which what was pruned is read by nothing, and return its directory."""
    model = load(original)
    state = model.state_dict()
    with torch.no_grad():
        for layer, kept in enumerate(keeps):
            if kept is not None:
                rows = kept_rows(model, kept)
                for name, wanted in (("self_attn.o_proj", rows["q_proj"]), ("mlp.down_proj", rows["gate_proj"])):
                    weight = state[f"model.layers.{layer}.{name}.weight"]
                    pruned = [channel for channel in range(weight.shape[1]) if channel not in set(wanted)]
                    weight[:, pruned] = 0
    shutil.copytree(original, directory)
    model.save_pretrained(directory)
    shutil.copy(original / "generation_config.json", directory)
    return directory


def load(checkpoint: Path) -> PreTrainedModel:
    """Load a checkpoint as it is stored, pruned or not."""
    register_pruned()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True)
    return model


def kept_rows(model: PreTrainedModel, kept: LayerKeep) -> dict[str, list[int]]:
    """Return which outputs of a layer's Linears stay, written out head by head."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    queries, keys = [], []
    for head in kept.kv_heads:
        for channel in range(head_dim):
            keys.append(head * head_dim + channel)
        for query in range(head * group, (head + 1) * group):
            for channel in range(head_dim):
                queries.append(query * head_dim + channel)
    channels = list(kept.ffn_channels)
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": channels, "up_proj": channels}


def shapes_of(model: PreTrainedModel, keeps: Keeps) -> PrunedShapes:
    """Return the sizes that are left."""
    config: Any = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    whole = LayerShape(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return PrunedShapes(
        tuple(
            whole
            if kept is None
            else LayerShape(len(kept.kv_heads) * group, len(kept.kv_heads), len(kept.ffn_channels))
            for kept in keeps
        )
    )


def make_manifest(original_fingerprint: str, keeps: Keeps, num_parameters: int = 1, **fields: Any) -> PruneManifest:
    """Make a manifest that says these were drawn at random."""
    told: dict[str, Any] = {
        "schema_version": 2,
        "original_fingerprint": original_fingerprint,
        "layers": tuple(keeps),
        "ratio": Fraction(1, 4),
        "steps": 1,
        "multiple": 1,
        "rule": "llm-pruner",
        "criterion": "random",
        "aggregation": "sum",
        "selection": "local",
        "protected": (0, 0),
        "calibration_sha256": None,
        "calibration_tokens": 0,
        "calibration_window": 0,
        "seed": 0,
        "num_parameters": num_parameters,
    }
    return PruneManifest(**(told | fields))


def _cut(state: dict[str, Tensor], prefix: str, rows: Mapping[str, Sequence[int]]) -> None:
    for name, tensor in list(state.items()):
        if not name.startswith(prefix):
            continue
        linear, attribute = name.split(".")[-2:]
        if linear in rows:
            state[name] = tensor[list(rows[linear])].clone()
        elif attribute == "weight" and linear in ("o_proj", "down_proj"):
            state[name] = tensor[:, list(rows["q_proj" if linear == "o_proj" else "gate_proj"])].clone()
