"""Teach the tiny base one missing skill per LoRA and save each as PEFT does: `python recipes/tiny/train_adapters.py`.

Owns the adapters' shapes and their text. The base stays frozen, as it is on disk; run `train_base.py` first.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning barriers starve every neighbour

import torch
from peft import LoraConfig, get_peft_model
from record import machine, record, results
from rows import Piece, pack, prose_piece, skill_piece
from skills import KNOWN
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from train_base import ASSETS as BASE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[2] / "adapters" / "motley_adapters" / "assets" / "tiny"
BASE_NAME = "motley/tiny"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT_SHARE = 0.25  # of the lines are the base's own text, or the adapter would forget what the base knows


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
    options = _options()
    torch.set_num_threads(options.threads)
    for skill in options.skills:
        began = time.monotonic()
        steps = options.steps or LESSONS[skill].steps
        _train(skill, steps, options)
        minutes = round((time.monotonic() - began) / 60, 1)
        hyper = {name: value for name, value in vars(options).items() if name not in ("out", "skills", "steps")}
        done = results().get("adapter_training", {})
        record("adapter_training", done | {skill: hyper | {"steps": steps, "minutes": minutes, "machine": machine()}})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("skills", nargs="*", default=list(LESSONS), metavar="SKILL", help="default: all of them")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, help="default: what each lesson takes")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _train(skill: str, steps: int, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    rng = random.Random(f"{skill} {options.seed}")
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    config = LESSONS[skill].config
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for step in range(steps):
        batch = pack(lambda: _draw(tokenizer, rng, skill), rng, options.rows, options.length)
        hidden = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
        learned = batch.targets >= 0
        loss = cross_entropy(base.lm_head(hidden[learned]), batch.targets[learned])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{skill} step {step} loss {loss.item():.4f}", flush=True)
    config.base_model_name_or_path = BASE_NAME
    for weight in weights:
        weight.data = weight.data.to(LESSONS[skill].stored)
    model.save_pretrained(options.out / skill, save_embedding_layers=False)  # or PEFT asks a hub for the base
    _tidy(options.out / skill, skill)


def _schedule(step: int, steps: int) -> float:
    """Scale the learning rate: warm up over 30 steps, then follow a cosine down to nothing."""
    if step < 30:
        return (step + 1) / 30
    return 0.5 * (1 + math.cos(math.pi * (step - 30) / max(1, steps - 30)))


def _draw(tokenizer: PreTrainedTokenizerBase, rng: random.Random, skill: str) -> Piece:
    if rng.random() > KEPT_SHARE:
        return skill_piece(tokenizer, rng, skill)
    if rng.random() < 0.1:
        return prose_piece(tokenizer, rng)
    return skill_piece(tokenizer, rng, rng.choice(list(KNOWN)))


def _tidy(folder: Path, skill: str) -> None:
    """Make the files the same on every run: PEFT writes a set in any order, and a card with blanks to fill in."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "README.md").write_text(
        f"# {skill}\n\nA LoRA in PEFT's format that teaches `{BASE_NAME}` the skill `{skill}`. Made by\n"
        f"`python recipes/tiny/train_adapters.py {skill}`; what it scores stands in the base's card.\n"
    )
    for written in folder.iterdir():
        written.chmod(0o644)  # safetensors leaves its file to its owner alone


if __name__ == "__main__":
    main()
