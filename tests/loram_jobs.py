"""Jobs of LoRAM that take a moment: a small random base, a little text, a few steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from architectures import build_checkpoint
from job_folders import make_job, write_dataset
from motley_trainer.job.files import Result
from motley_trainer.job.run import run

WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge marsh north ocean plain".split()
SAMPLES = [{"text": f"{first} {second} {WORDS[(i * j) % 16]}"} for i, first in enumerate(WORDS[:6]) for j, second in
           enumerate(WORDS[8:14])]  # fmt: skip
TEXT = [{"text": f"{first} lies beside {second}"} for first in WORDS for second in WORDS[:4]]
SPEC: dict[str, Any] = {
    "steps": 2,
    "batch_size": 4,
    "checkpoint_steps": 1,
    "seed": "7",
    "max_length": 16,
    "optimizer": {"learning_rate": 1e-2},
    "gate": {"max_loss_ratio": 100.0},
}
LAYERS = "1:3"  # of the four that the base has
ALIGNMENT = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}


def make_base(directory: Path, **config: Any) -> Path:
    """Write the base, which takes other fields of its config."""
    return build_checkpoint("llama", directory, **{"num_hidden_layers": 4, **config})


def loram_job(folder: Path, base: Path, *, align: Mapping[str, Any] | None = None, **more: Any) -> Path:
    """Write a job's folder; `more` is of LoramSettings, but for what a TrainingSpec has itself."""
    folder.mkdir(parents=True, exist_ok=True)
    outer = {name: more.pop(name) for name in ("quantization", "served", "dtype", *SPEC) if name in more}
    settings = {"lora": {"rank": 3}, "layers": LAYERS, **more}
    if "same_cut_as" in settings or settings.get("ratio") == "0":
        del settings["layers"]
    if align is not None:
        settings["alignment"] = {"dataset": write_dataset(folder / "data", TEXT), **ALIGNMENT, **align}
    return make_job(folder, SAMPLES, method="LORAM", base=base, loram=settings, **{**SPEC, **outer})


def ran(folder: Path) -> tuple[Result, list[Mapping[str, Any]]]:
    """Run a job, and return what came of it and what it told."""
    events: list[Mapping[str, Any]] = []
    return run(folder, events.append), events


def stages_of(events: list[Mapping[str, Any]]) -> list[str]:
    """Return what a job said that it does."""
    return [event["stage"] for event in events if "stage" in event]


@contextmanager
def collecting_quickly() -> Iterator[None]:
    """Let the collector, which a job calls between its bases, look at what the job has made alone."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
