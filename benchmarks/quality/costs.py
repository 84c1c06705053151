"""What a base takes, measured on the loaded base and beside it as its shapes alone say: bytes, and FLOPs of a pass.

Owns the count of FLOPs; that of bytes is the bases' ledger. Measured in float32 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from motley_bases.ledger import Weights, attention_layers, make_ledger
from motley_bases.loader import load_base, load_model, read_parsed_config
from motley_bases.pruned import read_pruned_shapes
from motley_bases.quantization import NONE
from motley_trainer.pruning.surgery import num_parameters
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Cost:
    """One quantity, as it was found and as shapes predict it."""

    measured: int
    predicted: int


def weight_bytes(checkpoint: Path) -> Cost:
    """Return what the loaded base holds: every storage of its parameters and buffers, each once."""
    model = load_base(checkpoint, dtype="float32", device=CPU).model
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    predicted = make_ledger(read_parsed_config(checkpoint), Weights(torch.float32)).weight_bytes
    return Cost(sum(storages.values()), predicted)


def forward_flops(checkpoint: Path, num_tokens: int) -> Cost:
    """Return the FLOPs of one pass over a sequence, logits of all its tokens included.

    Semantics: of the products alone. Attention is the explicit one, whose products can be counted: every token with
    every other, those that it may not see too.
    """
    model = load_model(checkpoint, torch.float32, CPU, NONE)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    return Cost(counter.get_total_flops(), predicted_flops(read_parsed_config(checkpoint), num_tokens))


def sizes(checkpoint: Path) -> dict[str, int]:
    """Return how many parameters, key-value heads and FFN channels a base has, in all its layers."""
    config = read_parsed_config(checkpoint)
    return {
        "parameters": num_parameters(load_model(checkpoint, torch.float32, CPU, NONE)),
        "kv_heads": sum(layer.num_kv_heads for layer in attention_layers(config)),
        "ffn_channels": sum(_ffn_sizes(config)),
    }


def predicted_flops(config: PreTrainedConfig, num_tokens: int) -> int:
    """Count the FLOPs of a pass from a config.

    Semantics: two for each weight of a Linear and token, and for each pair of tokens and channel of a query head two
    for its score and two for its value.
    """
    total: int = 2 * num_tokens * config.hidden_size * config.vocab_size
    for layer, ffn_size in zip(attention_layers(config), _ffn_sizes(config), strict=True):
        heads = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim
        total += 2 * num_tokens * config.hidden_size * (heads + 3 * ffn_size)
        total += 4 * num_tokens**2 * layer.num_heads * layer.head_dim
    return total


def _ffn_sizes(config: PreTrainedConfig) -> list[int]:
    shapes = read_pruned_shapes(config)
    if shapes is None:
        return [int(config.intermediate_size)] * int(config.num_hidden_layers)
    return [layer.ffn_size for layer in shapes.layers]
