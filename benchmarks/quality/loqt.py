"""How LoQT trains whole bases beside full training, from drawn weights and on from what the base knows.

Every seed has prose of its own, to learn from and held out. LoQT's bases come out of training jobs in float32 on one
thread, by the trainer's own code; full training is its loop with every weight. What is measured is the base that is
written, in bfloat16. Learning rates are chosen first, under a seed that nothing else is measured by.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import loqt_plan as plan
from cells import Row, measure_cells, parse_options, tune, write
from embedded import Line, draw_sentences
from full_training import train_full
from half_size import write_half_size
from jobs import open_base, subject_facts, write_job
from motley_trainer.job.run import run

Trials = Sequence[Mapping[str, Any]]


@cache
def open_texts(seed: int) -> tuple[list[Line], list[Line]]:
    """Draw one seed's samples, once in a process: to learn from, for the longest training, and held out."""
    held_out = draw_sentences(f"held out {seed}", plan.NUM_HELD_OUT)
    learned = draw_sentences(f"learned {seed}", max(plan.STEPS.values()) * plan.ROWS, set(held_out))
    return [{"text": text} for text in learned], [{"text": text} for text in held_out]


def measure_trial(trial: plan.Trial, seed: int) -> Row:
    """Measure one training at a rate that is not chosen yet."""
    return train(trial.start, trial.way, trial.rate, seed)


def measure_lesson(lesson: plan.Lesson, seed: int, *, trials: Trials) -> Row:
    """Measure one training."""
    return train(lesson.start, lesson.way, plan.chosen_rate(trials, lesson.start, lesson.way), seed)


def train(start: str, way: str, rate: float, seed: int, steps: int | None = None) -> Row:
    """Train a base and measure the held-out loss before and after."""
    steps = plan.STEPS[start] if steps is None else steps
    learned, held_out = open_texts(seed)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        base, hidden = None, int(open_base().model.config.hidden_size)
        if start == plan.SCRATCH:
            base = job / "half"
            hidden = write_half_size(base)
        spec = make_spec(start, way, rate, seed, steps, plan.rank_of(hidden))
        write_job(job, spec, learned[: steps * plan.ROWS], held_out, base)
        if way == plan.FULL:
            before, after = train_full(job)
            return {"loss_before": round(before, 5), "loss": round(after, 5), "merges": 0}
        result = run(job, lambda event: None)
    assert result.base is not None
    found = result.evaluation
    return {
        "loss_before": round(found.loss_before, 5),
        "loss": round(found.loss_after, 5),
        "merges": result.base.num_merges,
    }


def make_spec(start: str, way: str, rate: float, seed: int, steps: int, rank: int) -> dict[str, Any]:
    """Return the JSON of a TrainingSpec: what is not here is the trainer's default."""
    loqt = {
        "start": "LOQT_START_SCRATCH" if start == plan.SCRATCH else "LOQT_START_BASE",
        "rank": rank,
        **({} if way == plan.NEVER else {"merge_interval": plan.INTERVALS[start]}),
        **plan.SETTINGS.get(way, {}),
    }
    return {
        "method": "TRAINING_METHOD_LOQT",
        "loqt": loqt,
        "quantization": "none" if way == plan.WHOLE else "nf4",
        "steps": steps,
        "batch_size": plan.ROWS,
        "checkpoint_steps": steps,
        "seed": seed,
        "optimizer": {
            "learning_rate": rate,
            "schedule": "LEARNING_RATE_SCHEDULE_COSINE",
            "warmup_steps": steps // 10,
        },
        "gate": {"max_loss_ratio": 1e6},  # whatever comes of it is measured
    }


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__, has_subject=True)
    trials = tune(plan.list_trials(), measure_trial, options)
    cells = measure_cells(plan.list_lessons(), partial(measure_lesson, trials=trials), options)
    setting = {
        "subject": subject_facts(),
        "steps": plan.STEPS,
        "rows": plan.ROWS,
        "intervals": plan.INTERVALS,
        "held_out": plan.NUM_HELD_OUT,
    }
    write("quality_loqt", {"setting": setting, "trials": trials, "cells": cells}, options)


if __name__ == "__main__":
    main()
