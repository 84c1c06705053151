"""Checkpoints of pruned bases: how they are written, and how what is read is held against its manifest.

Model classes are in `pruned_models`, sizes in `pruned_shapes`. Runs on the thread that loads or makes a base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from motley_bases.errors import UnreadableBaseError
from motley_bases.fingerprint import fingerprint
from motley_bases.progress_bars import without_progress_bars
from motley_bases.prune_manifest import PruneManifest, read_prune_manifest
from motley_bases.pruned_geometry import DecoderShape
from motley_bases.pruned_models import CLASSES, PREFIX, check_prunable, is_pruned, register_pruned, without_shapes
from motley_bases.pruned_shapes import (
    FIELD,
    LayerShape,
    PrunedShapes,
    check_shapes,
    decoder_shape,
    read_pruned_shapes,
    whole_shapes,
)

__all__ = [
    "LayerShape", "PrunedShapes", "check_prunable", "decoder_shape", "is_pruned", "read_bound_manifest",
    "read_pruned_shapes", "register_pruned", "save_pruned", "whole_shapes",
]  # fmt: skip


def read_bound_manifest(directory: Path, config: PreTrainedConfig, pruned_fingerprint: str) -> PruneManifest | None:
    """Read the manifest that lies beside a pruned base, and insist that it is this base's own; None for a whole one.

    Raises: UnreadableBaseError with reason PRUNED_SHAPES, NO_PRUNE_MANIFEST or PRUNE_MANIFEST, as the readers of shapes
    and manifest do; with reason OTHER_MANIFEST and the field if it is the manifest of another base.
    """
    shapes = read_pruned_shapes(config)
    if not is_pruned(config):
        if shapes is not None:
            message = f"{FIELD} is said of a {config.model_type}, whose layers are all whole"
            raise UnreadableBaseError(message, reason="PRUNED_SHAPES", field=FIELD)
        return None
    if shapes is None:
        raise without_shapes(config)
    manifest = read_prune_manifest(directory)
    if manifest.pruned_fingerprint != pruned_fingerprint:
        told = manifest.pruned_fingerprint or "no weights at all"
        raise _other_manifest("pruned_fingerprint", f"is of {told}, and these are {pruned_fingerprint}")
    _check_kept_sizes(manifest, shapes, decoder_shape(config))
    return manifest


def save_pruned(
    model_state: Mapping[str, Tensor], original_config: PreTrainedConfig, shapes: PrunedShapes, directory: Path
) -> str:
    """Write a pruned base's config and weights, and return the fingerprint of what was written.

    Semantics: `original_config` is that of the whole model; a pruned one is as good, since it has the same numbers.
    Effects: writes config.json, generation_config.json (made from the config; put the original's in its place) and the
    safetensors. Tokenizer and manifest are the caller's.
    Raises: UnsupportedBaseError with reason NOT_PRUNABLE; UnreadableBaseError with reason PRUNED_SHAPES for shapes that
    cannot be, OTHER_WEIGHTS for tensors that do not have them.
    """
    check_prunable(original_config)
    check_shapes(shapes, decoder_shape(original_config))
    config_class, model_class = CLASSES[str(original_config.model_type).removeprefix(PREFIX)]
    fields = {
        **original_config.to_dict(),
        FIELD: shapes.to_config(),
        "head_dim": decoder_shape(original_config).head_dim,
    }
    for name in ("model_type", "architectures", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    config = config_class(**fields)
    with torch.device("meta"):
        model = cast(Any, model_class)(config)
    _check_state(model, model_state)
    model.load_state_dict({**model_state}, strict=False, assign=True)  # a tied lm_head need not be there
    model.tie_weights()
    with without_progress_bars():
        model.save_pretrained(directory)
    return fingerprint(directory)


def _check_kept_sizes(manifest: PruneManifest, shapes: PrunedShapes, original: DecoderShape) -> None:
    """Refuse a manifest that keeps other numbers of heads and channels than the layers have."""
    if len(manifest.layers) != len(shapes.layers):
        raise _other_manifest("layers", f"has {len(manifest.layers)} layers, the model has {len(shapes.layers)}")
    for layer, (kept, shape) in enumerate(zip(manifest.layers, shapes.layers, strict=True)):
        kv_heads = range(original.num_kv_heads) if kept is None else kept.kv_heads
        channels = range(original.ffn_size) if kept is None else kept.ffn_channels
        if len(kv_heads) != shape.num_kv_heads or kv_heads[-1] >= original.num_kv_heads:
            raise _other_manifest(
                f"layers[{layer}].kv_heads", f"are not {shape.num_kv_heads} of {original.num_kv_heads}"
            )
        if len(channels) != shape.ffn_size or channels[-1] >= original.ffn_size:
            raise _other_manifest(f"layers[{layer}].ffn_channels", f"are not {shape.ffn_size} of {original.ffn_size}")


def _other_manifest(name: str, problem: str) -> UnreadableBaseError:
    field = f"prune_manifest.{name}"
    return UnreadableBaseError(f"{field} {problem}: it is another base's", reason="OTHER_MANIFEST", field=field)


def _check_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for name, shape in wanted.items():
        if name not in state and name != tied:
            raise _other_weights(name, "is missing")
        if name in state and tuple(state[name].shape) != shape:
            raise _other_weights(name, f"has shape {tuple(state[name].shape)}, {FIELD} says {shape}")
    for name in state:
        if name not in wanted:
            raise _other_weights(name, "is no tensor of this model")


def _other_weights(name: str, problem: str) -> UnreadableBaseError:
    return UnreadableBaseError(f"{name} {problem}", reason="OTHER_WEIGHTS", field=name)
