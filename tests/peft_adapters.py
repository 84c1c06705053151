"""Adapters made by PEFT itself, with factors large enough to change answers, and PEFT's own answers under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    base: Path, directory: Path, *, seed: int, strength: float = 0.5, target_modules: Any = ALL_LINEAR, **config: Any
) -> Path:
    """Save a PEFT LoRA directory for a base checkpoint and return it."""
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    config.setdefault("r", 4)
    config.setdefault("lora_alpha", 8)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=target_modules, **config)
    peft_model = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                fan_in = parameter.shape[1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (strength / fan_in) ** 0.5)
    peft_model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def generate(
    base: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None, *, max_new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return the greedy tokens and log-probabilities that transformers' `generate` gives each prompt alone."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return greedy_answers(model, prompts, max_new_tokens=max_new_tokens)


def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> list[tuple[list[int], list[float]]]:
    """Return what `generate` of transformers, or of PEFT, gives each prompt alone."""
    model.eval()
    answers = []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = output.sequences[0, len(prompt) :].tolist()
        logprobs = [
            float(torch.log_softmax(logits[0].float(), -1)[token])
            for logits, token in zip(output.logits, tokens, strict=True)
        ]
        answers.append((tokens, logprobs))
    return answers
