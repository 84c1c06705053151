"""An adapter's folder as it is committed: the same bytes on every run, and a line on where it is from.

Owns where it lies, what is there beside the kind's own files, and the facts of the base that those files declare.
"""

import json
from pathlib import Path
from textwrap import fill

import torch
from motley_bases.loader import load_base
from motley_bases.spec import BaseSpec
from train_base import ASSETS as BASE

ASSETS = Path(__file__).parents[2] / "adapters" / "motley_adapters" / "assets" / "tiny"
BASE_NAME = "motley/tiny"
PEFT_CONFIG = "adapter_config.json"


def described_base() -> BaseSpec:
    """Describe the base on disk as the server does."""
    return load_base(BASE, dtype="float32", device=torch.device("cpu")).spec


def tidy(folder: Path, skill: str, what: str, command: str) -> None:
    """Write the README, and make the files the same on every run: PEFT writes a set in any order, and a blank card."""
    if (folder / PEFT_CONFIG).exists():
        config = json.loads((folder / PEFT_CONFIG).read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    text = (
        f"{what} that teaches `{BASE_NAME}` the skill `{skill}`. Made by `python recipes/tiny/{command}`; what it "
        "scores stands in the base's card."
    )
    (folder / "README.md").write_text(f"# {skill}\n\n{fill(text, 120, break_on_hyphens=False)}\n")
    for written in folder.iterdir():
        written.chmod(0o644)  # safetensors leaves its file to its owner alone
