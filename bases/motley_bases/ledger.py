"""The memory ledger: what a base, its keys and values, and adapters on it take, told from a config alone.

Shapes come from transformers' own classes, built without memory for their weights, so that what is counted is what a
loader would make; nothing is read but the config. Pure but for transformers' registries; any thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from motley_kernels.adapter_delta.pool import ALIGNMENT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from motley_bases.admission import declared_windows
from motley_bases.kv_cache import bytes_per_token
from motley_bases.packing import can_pack, packing_blocks
from motley_bases.pruned import read_pruned_shapes, register_pruned
from motley_bases.quantization import CONFIG_FIELD, NONE, is_linear, linear_bytes
from motley_bases.refusing import refusing
from motley_bases.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Weights:
    """How a base's weights are held."""

    dtype: torch.dtype
    quantization: str = NONE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class Ledger:
    """What things take on the device, in bytes.

    Semantics: `linears` are the (in_features, out_features) of the layers' Linears: what an adapter on all of them
    attaches to. What a step works with comes on top of everything here.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    linears: tuple[tuple[int, int], ...]
    factor_bytes: int  # of one number of an adapter

    def kv_tokens(self, num_bytes: int, block_size: int = 1) -> int:
        """Return how many tokens' keys and values fit, in whole blocks."""
        return max(0, num_bytes) // (self.kv_bytes_per_token * block_size) * block_size

    def adapter_bytes(self, rank: int) -> int:
        """Return what a LoRA of this rank on all Linears of the layers takes, every factor on a line of its own."""
        factors = (rank * size * self.factor_bytes for sides in self.linears for size in sides)
        return sum(-(-num_bytes // ALIGNMENT) * ALIGNMENT for num_bytes in factors)


def make_ledger(config: PreTrainedConfig, weights: Weights) -> Ledger:
    """Count what a base takes when it is held in a certain way.

    Semantics: where the config says that the weights are stored quantized, that is how they are counted.
    """
    model = outline_model(config, weights.dtype)
    lm_head = cast(Any, model).get_output_embeddings()
    linears = tuple(
        (module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_linear(module) and module is not lm_head
    )
    factor_dtype = torch.float32 if weights.device.type == "cpu" else weights.dtype
    return Ledger(
        weight_bytes=_weight_bytes(model, lm_head, weights),
        kv_bytes_per_token=bytes_per_token(attention_layers(config), weights.dtype),
        linears=linears,
        factor_bytes=factor_dtype.itemsize,
    )


def attention_layers(config: PreTrainedConfig) -> tuple[LayerSpec, ...]:
    """Return each layer's attention as a config declares it."""
    sizes = cast(Any, config)
    num_heads = int(sizes.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or sizes.hidden_size // num_heads)
    heads = [(num_heads, num_kv_heads)] * int(sizes.num_hidden_layers)
    if (shapes := read_pruned_shapes(config)) is not None:
        heads = [(layer.num_heads, layer.num_kv_heads) for layer in shapes.layers]
    return tuple(
        LayerSpec(queries, keys, head_dim, window)
        for (queries, keys), window in zip(heads, declared_windows(config), strict=True)
    )


def outline_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model that a config describes, without memory for its weights.

    Raises: UnreadableBaseError with reason MODEL_CONSTRUCTION if transformers cannot.
    """
    register_pruned()
    plain = copy.deepcopy(config)
    plain._attn_implementation = "eager"
    with torch.device("meta"), refusing(f"a {config.model_type} cannot be built of this config", "MODEL_CONSTRUCTION"):
        model = cast(Any, AutoModelForCausalLM).from_config(plain, dtype=dtype)
        model.tie_weights()
    return cast(PreTrainedModel, model)


def _weight_bytes(model: PreTrainedModel, lm_head: nn.Linear, weights: Weights) -> int:
    """Return the bytes of all parameters and buffers, each counted once."""
    stored = _stored_quantization(model.config)
    quantized = _quantized_weights(model, lm_head, stored) if weights.quantization != NONE else {}
    is_nested = stored is None or bool(stored.get("bnb_4bit_use_double_quant"))
    packed: dict[Tensor, tuple[int, int]] = {}
    if can_pack(weights.device, weights.dtype):
        blocks = packing_blocks()
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        packed = {linear.weight: (linear.in_features, linear.out_features) for linear in linears}
    total = 0
    for tensor in {*model.parameters(), *model.buffers()}:
        if (sides := quantized.get(tensor)) is not None:
            total += linear_bytes(weights.quantization, *sides, is_nested=is_nested)
        elif (sides := packed.get(tensor)) is not None:
            total += blocks.packed_bytes(*sides)
        else:
            total += tensor.nbytes
    embedding = cast(Any, model).get_input_embeddings().weight
    return total + (embedding.nbytes if embedding in packed else 0)  # tied: packed as a head, plain to look tokens up


def _stored_quantization(config: PreTrainedConfig) -> Mapping[str, object] | None:
    """Return what a config says of quantized weights, as it is stored or as transformers keeps it once loaded."""
    stored = getattr(config, CONFIG_FIELD, None)
    return cast(Mapping[str, object] | None, stored if stored is None or isinstance(stored, dict) else stored.to_dict())


def _quantized_weights(
    model: PreTrainedModel, lm_head: nn.Linear, stored: Mapping[str, object] | None
) -> dict[Tensor, tuple[int, int]]:
    """Return the weights that a quantizer takes, with their two sides."""
    whole = list(cast(Iterable[str], (stored or {}).get("llm_int8_skip_modules") or ()))
    return {
        module.weight: (module.weight.shape[1], module.weight.shape[0])
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not lm_head and should_convert_module(path, whole)
    }
