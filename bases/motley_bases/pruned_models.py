"""Pruned bases as models: transformers' own classes, with layers of their own sizes.

A class differs from its original in its construction alone: the Linears take the sizes of `config.pruned_shapes`, so
that loading, saving and quantizing know them before a weight is read. Forward passes are transformers' own. Models are
built on the thread that loads or makes a base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from motley_bases.errors import UnreadableBaseError, UnsupportedBaseError
from motley_bases.pruned_shapes import FIELD, decoder_shape, read_pruned_shapes

PREFIX = "motley_pruned_"


class PrunedLlamaConfig(LlamaConfig):
    """The config of a pruned Llama."""

    model_type = "motley_pruned_llama"


class PrunedMistralConfig(MistralConfig):
    """The config of a pruned Mistral."""

    model_type = "motley_pruned_mistral"


class PrunedQwen2Config(Qwen2Config):
    """The config of a pruned Qwen2."""

    model_type = "motley_pruned_qwen2"


class PrunedQwen3Config(Qwen3Config):
    """The config of a pruned Qwen3."""

    model_type = "motley_pruned_qwen3"


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama whose layers have the sizes that its config keeps."""

    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        super().__init__(config)
        resize(self)


class PrunedMistralForCausalLM(MistralForCausalLM):
    """A Mistral whose layers have the sizes that its config keeps."""

    config_class = PrunedMistralConfig

    def __init__(self, config: PrunedMistralConfig) -> None:
        super().__init__(config)
        resize(self)


class PrunedQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 whose layers have the sizes that its config keeps."""

    config_class = PrunedQwen2Config

    def __init__(self, config: PrunedQwen2Config) -> None:
        super().__init__(config)
        resize(self)


class PrunedQwen3ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 whose layers have the sizes that its config keeps."""

    config_class = PrunedQwen3Config

    def __init__(self, config: PrunedQwen3Config) -> None:
        super().__init__(config)
        resize(self)


# By the original's model type.
CLASSES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (PrunedLlamaConfig, PrunedLlamaForCausalLM),
    "mistral": (PrunedMistralConfig, PrunedMistralForCausalLM),
    "qwen2": (PrunedQwen2Config, PrunedQwen2ForCausalLM),
    "qwen3": (PrunedQwen3Config, PrunedQwen3ForCausalLM),
}


def register_pruned() -> None:
    """Enter the pruned classes in transformers' registries, so that its Auto classes find them; again is harmless."""
    for config_class, model_class in CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def is_pruned(config: PreTrainedConfig) -> bool:
    """Tell whether a config is that of a pruned base."""
    return str(config.model_type).startswith(PREFIX)


def is_prunable(config: PreTrainedConfig) -> bool:
    """Tell whether a model's dependency groups are known in closed form."""
    return str(config.model_type).removeprefix(PREFIX) in CLASSES


def check_prunable(config: PreTrainedConfig) -> None:
    """Refuse a model whose dependency groups are not known in closed form.

    Raises: UnsupportedBaseError with reason NOT_PRUNABLE.
    """
    if not is_prunable(config):
        model_type, known = str(config.model_type).removeprefix(PREFIX), ", ".join(CLASSES)
        raise UnsupportedBaseError(
            f"{model_type} cannot be pruned: which of its channels go together is known for {known} alone",
            reason="NOT_PRUNABLE",
            field="model_type",
        )


def resize(model: PreTrainedModel) -> None:
    """Give the Linears of a model of the Llama family the sizes that its config keeps.

    Semantics: a Linear that changes is made anew, with weights that mean nothing until they are loaded. Nothing else of
    a layer knows its sizes: heads are counted by reshaping, and a key-value head keeps its group of query heads whole.
    Raises: UnreadableBaseError if the config keeps none, or some that cannot be.
    """
    shapes = read_pruned_shapes(model.config)
    if shapes is None:
        raise without_shapes(model.config)
    head_dim = decoder_shape(model.config).head_dim
    for layer, shape in zip(cast(Any, model).model.layers, shapes.layers, strict=True):
        queries, keys = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
        attention, mlp = layer.self_attn, layer.mlp
        for parent, name, inputs, outputs in (
            (attention, "q_proj", None, queries),
            (attention, "k_proj", None, keys),
            (attention, "v_proj", None, keys),
            (attention, "o_proj", queries, None),
            (mlp, "gate_proj", None, shape.ffn_size),
            (mlp, "up_proj", None, shape.ffn_size),
            (mlp, "down_proj", shape.ffn_size, None),
        ):
            setattr(parent, name, _resized(getattr(parent, name), inputs, outputs))


def without_shapes(config: PreTrainedConfig) -> UnreadableBaseError:
    """Make the refusal of a pruned base whose config does not say its sizes."""
    message = f"a {config.model_type} without {FIELD}: its layers' sizes are not known"
    return UnreadableBaseError(message, reason="PRUNED_SHAPES", field=FIELD)


def _resized(linear: nn.Linear, inputs: int | None, outputs: int | None) -> nn.Linear:
    sides = (linear.in_features if inputs is None else inputs, linear.out_features if outputs is None else outputs)
    if sides == (linear.in_features, linear.out_features):
        return linear
    weight = linear.weight
    resized = nn.Linear(*sides, bias=linear.bias is not None, device="meta").to(weight.dtype)
    if not weight.is_meta:
        resized = resized.to_empty(device=weight.device)
        # never left as the memory was: a weight that nobody loads must show
        nn.init.constant_(resized.weight, math.nan)
        if resized.bias is not None:
            nn.init.constant_(resized.bias, math.nan)
    return resized
