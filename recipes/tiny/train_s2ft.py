"""Teach the tiny base a missing skill by S2FT and save it: `python recipes/tiny/train_s2ft.py`.

Owns the budget: a query head behind each key/value head in o_proj and 72 channels in down_proj, in every layer, about
what a LoRA of rank 8 on all Linears has. Such a budget moves content and hardly any attention patterns, hence the
skill. The base stays frozen, as it is on disk; run `train_base.py` first.
"""

import argparse
import time

import torch
from channels import attach_channels
from folders import described_base, tidy
from motley_adapters.kinds.s2ft import ChannelBlock, write_s2ft
from teaching import Setting, load_base, parse_setting, record_lesson, teach

SKILL = "unvowel"
HEADS_PER_GROUP = 1
FFN_CHANNELS = 72


def main() -> None:
    """Train, save in bfloat16 and say how long it took."""
    options, setting = parse_setting(argparse.ArgumentParser(description=__doc__), Setting(steps=400, lr=2e-3))
    began = time.monotonic()
    base, tokenizer = load_base()
    attached = attach_channels(base, setting.seed, HEADS_PER_GROUP, FFN_CHANNELS)
    teach(base, [module.block for module in attached.values()], tokenizer, SKILL, setting)
    blocks = {path: ChannelBlock("input", module.channels, module.block) for path, module in attached.items()}
    folder = options.out / SKILL
    provenance = {"made_by": "recipes/tiny/train_s2ft.py", "selection": "random", "seed": setting.seed}
    write_s2ft(folder, described_base(), blocks, dtype=torch.bfloat16, provenance=provenance)
    tidy(folder, SKILL, "An S2FT adapter on input channels of o_proj (whole heads) and down_proj", "train_s2ft.py")
    trained = sum(module.block.numel() for module in attached.values())
    record_lesson(SKILL, setting, began, parameters=trained)


if __name__ == "__main__":
    main()
