"""Quantized bases by transformers and bitsandbytes alone, as references: what they generate, and what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

METHODS = ("nf4", "int8")


def quantized_model(checkpoint: Path, method: str, **more: Any) -> PreTrainedModel:
    """Load a checkpoint in float32 with transformers' quantizer, and keep NF4's products from changing the weights."""
    settings: dict[str, Any] = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        if method == "nf4"
        else {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    )
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**settings, **more, bnb_4bit_compute_dtype=torch.float32),
        device_map={"": torch.device("cpu")},
        attn_implementation="eager",
        local_files_only=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def meant_weight(linear: Any) -> Tensor:
    """Expand a weight by its definition: NF4's values, scaled block by block; INT8's codes, scaled row by row."""
    if hasattr(linear, "state"):
        scales = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
        return linear.weight.float() * scales[:, None] / 127
    state = linear.weight.quant_state
    packed = linear.weight.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()]
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    scales = scales + state.offset
    return (state.code[codes] * scales.repeat_interleave(64)[: len(codes)]).view(state.shape)


def write_meant(checkpoint: Path, method: str, directory: Path) -> Path:
    """Write the whole checkpoint, in float32, whose weights are those that the quantized one stands for."""
    quantized = quantized_model(checkpoint, method)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        for path, module in quantized.named_modules():
            if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
                whole.get_submodule(path).weight.copy_(meant_weight(module))
    whole.save_pretrained(directory)
    return directory
