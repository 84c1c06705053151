"""Teach the tiny base one missing skill per LoRA and save each as PEFT does: `python recipes/tiny/train_adapters.py`.

Owns the shapes of the four LoRAs. The base stays frozen, as it is on disk; run `train_base.py` first.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from folders import tidy
from peft import LoraConfig, get_peft_model
from teaching import BASE_NAME, LINEARS, Setting, load_base, parse_setting, record_lesson, teach


class Lesson(NamedTuple):
    """How one skill is taught: the LoRA, for how many steps, and the dtype its file is stored in."""

    config: LoraConfig
    steps: int = 400
    stored: torch.dtype = torch.float32


# Between them they use most of what a LoRA's configuration can say. Sorting is the hardest and takes the most.
LESSONS = {
    "reverse": Lesson(LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)),
    "next": Lesson(LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=LINEARS)),
    "sort": Lesson(
        LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=LINEARS,
            rank_pattern={"k_proj": 8, "v_proj": 8},
            alpha_pattern={"k_proj": 16, "v_proj": 16},
        ),
        steps=1000,
        stored=torch.bfloat16,
    ),
    "swap": Lesson(
        LoraConfig(r=8, lora_alpha=16, target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"),
    ),
}


def main() -> None:
    """Train the adapters that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("skills", nargs="*", default=list(LESSONS), metavar="SKILL", help="default: all of them")
    options, setting = parse_setting(parser, Setting(steps=0))  # 0 steps: what each lesson takes
    for skill in options.skills:
        began = time.monotonic()
        lesson = setting._replace(steps=setting.steps or LESSONS[skill].steps)
        _train(skill, lesson, options.out / skill)
        record_lesson(skill, lesson, began)


def _train(skill: str, setting: Setting, folder: Path) -> None:
    torch.manual_seed(setting.seed)
    base, tokenizer = load_base()
    config = LESSONS[skill].config
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    teach(base, weights, tokenizer, skill, setting)
    config.base_model_name_or_path = BASE_NAME
    for weight in weights:
        weight.data = weight.data.to(LESSONS[skill].stored)
    model.save_pretrained(folder, save_embedding_layers=False)  # or PEFT asks a hub for the base
    tidy(folder, skill, "A LoRA in PEFT's format", f"train_adapters.py {skill}")


if __name__ == "__main__":
    main()
