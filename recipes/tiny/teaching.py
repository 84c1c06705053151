"""One lesson: lines of a skill and of the base's own text, a loss, an optimiser over whatever is to learn.

Owns the mixture of text, the schedule and the loop that all kinds of adapters share. Knows nothing of any kind.
"""

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning barriers starve every neighbour

import torch
from record import machine, record, results
from rows import Piece, pack, prose_piece, skill_piece
from skills import KNOWN
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from train_base import ASSETS as BASE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[2] / "adapters" / "motley_adapters" / "assets" / "tiny"
BASE_NAME = "motley/tiny"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEPT_SHARE = 0.25  # of the lines are the base's own text, or the adapter would forget what the base knows


class Setting(NamedTuple):
    """How long, how much at a time, how fast, from which seed, and with how much of the base's own text."""

    steps: int
    rows: int = 24
    length: int = 64
    lr: float = 4e-3
    seed: int = 1
    kept_share: float = KEPT_SHARE


def parse_setting(parser: argparse.ArgumentParser, default: Setting) -> tuple[argparse.Namespace, Setting]:
    """Add the options that all lessons share, parse the command line, and start torch's threads as it says."""
    parser.add_argument("--out", type=Path, default=ASSETS)
    for name in ("steps", "rows", "length", "lr", "seed"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    given = {name: getattr(options, name) for name in ("steps", "rows", "length", "lr", "seed")}
    return options, default._replace(**given)


def record_lesson(skill: str, setting: Setting, began: float, **more: object) -> None:
    """Record how one adapter was trained, and how long it took since the monotonic instant `began`."""
    figures: dict[str, object] = {name: getattr(setting, name) for name in ("steps", "rows", "length", "lr", "seed")}
    figures |= {"threads": torch.get_num_threads(), "machine": machine(), **more}
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    record("adapter_training", results().get("adapter_training", {}) | {skill: figures})


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base as it is on disk, in float32 and frozen, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    base = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
    return base.requires_grad_(False), tokenizer


def teach(
    base: PreTrainedModel,
    weights: Iterable[torch.nn.Parameter],
    tokenizer: PreTrainedTokenizerBase,
    skill: str,
    setting: Setting,
    extra_loss: Callable[[], Tensor] | None = None,
) -> None:
    """Train `weights`, wherever in the base they sit, until the skill's answers come.

    Semantics: `extra_loss` is added after each forward pass; a `kept_share` of 1 teaches the base's own text alone.
    """
    weights = list(weights)
    rng = random.Random(f"{skill} {setting.seed}")
    optimizer = torch.optim.AdamW(weights, lr=setting.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: _schedule(step, setting.steps))
    for step in range(setting.steps):
        batch = pack(lambda: _draw(tokenizer, rng, skill, setting.kept_share), rng, setting.rows, setting.length)
        hidden = base.model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
        learned = batch.targets >= 0
        loss = task_loss = cross_entropy(base.lm_head(hidden[learned]), batch.targets[learned])
        if extra_loss is not None:
            loss = task_loss + extra_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == setting.steps - 1:
            print(f"{skill} step {step} loss {task_loss.item():.4f}", flush=True)


def _schedule(step: int, steps: int) -> float:
    """Scale the learning rate: warm up over 30 steps, then follow a cosine down to nothing."""
    if step < 30:
        return (step + 1) / 30
    return 0.5 * (1 + math.cos(math.pi * (step - 30) / max(1, steps - 30)))


def _draw(tokenizer: PreTrainedTokenizerBase, rng: random.Random, skill: str, kept_share: float) -> Piece:
    if rng.random() > kept_share:
        return skill_piece(tokenizer, rng, skill)
    if rng.random() < 0.1:
        return prose_piece(tokenizer, rng)
    return skill_piece(tokenizer, rng, rng.choice(list(KNOWN)))
