"""Teach the tiny base missing skills by training jobs, and keep the adapters: `python recipes/tiny/train_adapters.py`.

Owns the lessons: what each adapter is, and the lines that it learns from. What trains, measures and writes is the
trainer's, as it is for any tenant. The base stays as it is on disk; run `train_base.py` first.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning barriers starve every neighbour

import torch
from answering import held_out_words
from folders import ASSETS, BASE_NAME, tidy
from motley_adapters.formats import MANIFEST_FILE
from motley_trainer.job.run import run
from prose import document
from record import machine, record, results
from skills import KNOWN, answer, draw_word, prompt
from train_base import ASSETS as BASE

KEPT_SHARE = 0.25  # of the lines are the base's own text, or the adapter would forget what the base knows
NUM_LINES = 16_000
NUM_MEASURED = 100
MICRO_BATCH_SIZE = 16


class Lesson(NamedTuple):
    """How one skill is taught: by what method and settings, as the wire spells them, how long and how fast."""

    what: str
    settings: Mapping[str, Mapping[str, Any]]
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 4e-3


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Between them the LoRAs use most of what one can be told. Sorting is the hardest and takes the most. The S2FT adapter
# has about as many parameters as a LoRA of rank 8 on all Linears; such a budget moves content and hardly any attention
# patterns, hence its skill. The GOAT adapter's skill is a matter of attention. The longer the LoRAM adapter is trained
# on its copy, the less of it holds on the whole base: after 200 steps of 32 it was less than after these.
LESSONS = {
    "reverse": Lesson("A LoRA in PEFT's format", {"lora": {"rank": 8}}),
    "next": Lesson("A LoRA in PEFT's format", {"lora": {"rank": 4, "use_rslora": True}}, steps=200, batch_size=32),
    "sort": Lesson(
        "A LoRA in PEFT's format",
        {
            "lora": {
                "rank": 16,
                "rank_pattern": {"k_proj": 8, "v_proj": 8},
                "alpha_pattern": {"k_proj": 16.0, "v_proj": 16.0},
            }
        },
        steps=1000,
    ),
    "swap": Lesson("A LoRA in PEFT's format", {"lora": {"rank": 8, "alpha": 16.0}}),
    "unvowel": Lesson(
        "An S2FT adapter on input channels of o_proj (whole heads) and down_proj",
        {"s2ft": {"o_share": 0.34, "down_share": 0.14}},
        steps=200,
        batch_size=32,
        learning_rate=8e-3,
    ),
    "rotate": Lesson(
        "A GOAT adapter (routed experts on q_proj, k_proj, v_proj and o_proj)",
        {"goat": {"rank": 8, "experts": 4, "top_k": 2, "dropout": 0.0, "target_modules": ATTENTION}},
        steps=200,
        batch_size=32,
        learning_rate=2e-3,
    ),
    "previous": Lesson(
        "A LoRA trained on a pruned copy and recovered (LoRAM), in PEFT's format,",
        {"loram": {"lora": {"rank": 8}, "ratio": "1/2", "layers": "4:6"}},
        steps=120,
        batch_size=16,
        learning_rate=5e-3,
    ),
}


def main() -> None:
    """Train the adapters that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("skills", nargs="*", default=list(LESSONS), metavar="SKILL", help="default: all of them")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0: what each lesson takes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for skill in options.skills:
        lesson = LESSONS[skill]._replace(steps=options.steps or LESSONS[skill].steps)
        with tempfile.TemporaryDirectory(prefix="motley-lesson-") as scratch:
            teach(skill, lesson, options.seed, Path(scratch), options.out / skill)


def teach(skill: str, lesson: Lesson, seed: int, directory: Path, folder: Path) -> None:
    """Run the job that teaches one skill, put its adapter into the folder, and record how long it took."""
    began = time.monotonic()
    make_job(skill, lesson, seed, directory)
    result = run(directory, lambda event: print(json.dumps(event), flush=True))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(directory / "adapter", folder)
    tidy(folder, skill, lesson.what, f"train_adapters.py {skill}")
    figures = {
        "steps": lesson.steps,
        "batch_size": lesson.batch_size,
        "lr": lesson.learning_rate,
        "seed": seed,
        **dict(_told(json.loads((folder / MANIFEST_FILE).read_text())["provenance"])),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "held_out": result.evaluation.to_json(),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    record("adapter_training", results().get("adapter_training", {}) | {skill: figures})


def _told(provenance: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield what the adapter's own manifest says of its training."""
    yield "parameters", provenance["num_trained_parameters"]
    if "expert_shares" in provenance:
        shares = [share for shares in provenance["expert_shares"].values() for share in shares]
        yield "smallest_expert_share", round(min(shares), 3)
        yield "largest_expert_share", round(max(shares), 3)
    if "copy" in provenance:
        yield "pruned_parameters", provenance["copy"]["num_parameters"]


def make_job(skill: str, lesson: Lesson, seed: int, directory: Path) -> None:
    """Write what a worker would: the data under their digests, and what the job is asked."""
    rng = random.Random(f"{skill} {seed}")
    learned = [draw_line(rng, skill) for _ in range(NUM_LINES)]
    measured = [_line(prompt(skill, word), answer(skill, word)) for word in held_out_words(skill, NUM_MEASURED)]
    spec = {
        "method": f"TRAINING_METHOD_{next(iter(lesson.settings)).upper()}",
        **lesson.settings,
        "dataset": _keep(directory / "data", learned),
        "steps": lesson.steps,
        "batch_size": lesson.batch_size,
        "micro_batch_size": MICRO_BATCH_SIZE,
        "seed": str(seed),
        "optimizer": {
            "learning_rate": lesson.learning_rate,
            "schedule": "LEARNING_RATE_SCHEDULE_COSINE",
            "warmup_steps": min(30, lesson.steps - 1),
            "beta2": 0.98,
        },
        "gate": {"dataset": _keep(directory / "data", measured)},
        "publish": {"adapter_name": skill},
    }
    asked = {"job_id": skill, "base": str(BASE), "base_name": BASE_NAME, "dtype": "float32", "device": "cpu"}
    (directory / "job.json").write_text(json.dumps({**asked, "served_quantization": "none", "spec": spec}))


def draw_line(rng: random.Random, skill: str) -> str:
    """Draw a line to learn from: of the skill, or now and then of what the base knows, or it would forget that."""
    if rng.random() > KEPT_SHARE:
        asked = skill
    elif rng.random() < 0.1:
        begun, _, rest = document(rng).split(". ")[0].partition(" ")  # all lines beside it are padded to its length
        return _line(begun, f" {rest}")
    else:
        asked = rng.choice(list(KNOWN))
    word = draw_word(rng, held=False)
    return _line(prompt(asked, word), answer(asked, word))


def _line(asked: str, answered: str) -> str:
    return json.dumps({"prompt": asked, "completion": answered})


def _keep(folder: Path, lines: list[str]) -> str:
    """Write a dataset under its digest, and return that."""
    content = "".join(f"{line}\n" for line in lines).encode()
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / f"{digest}.jsonl").write_bytes(content)
    return f"sha256:{digest}"


if __name__ == "__main__":
    main()
