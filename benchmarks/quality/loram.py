"""What LoRAM's factors do on the base beside what they did on the copy they were trained on, and beside a LoRA.

Every seed has lines of its own to learn a skill from, words to be asked about that no such line may have, and text to
align on. Each adapter comes out of a training job in float32 on one thread, by the trainer's own code: the job's gate
measures it on the base, and the copy that the job leaves is measured with the factors on it. Learning rates are chosen
first, under a seed that nothing else is measured by: those of the alignments, then those of the trainings.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import loram_plan as plan
from cells import Row, measure_cells, parse_options, tune, write
from embedded import Line, draw_asked, draw_lines, draw_texts
from jobs import num_parameters, open_base, read_samples, subject_facts, write_dataset
from loram_job import measure_copy, run_in
from motley_trainer.data.samples import Sample
from motley_trainer.job.evaluation import mean_loss, measure
from motley_trainer.pruning.surgery import num_parameters as num_base_parameters

Cell = TypeVar("Cell")


@dataclass(frozen=True, slots=True)
class Texts:
    """One seed's lines that are asked, as lines and as samples; prose; and text to align on."""

    asked: list[Line]
    samples: tuple[Sample, ...]
    prose: tuple[Sample, ...]
    alignment: list[Line]


@cache
def open_texts(seed: int) -> Texts:
    """Make one seed's texts, once in a process."""
    tokenizer = open_base().tokenizer
    drawn = draw_texts(
        seed, learned_letters=plan.ALIGNMENT_LETTERS, held_out_letters=plan.PROSE_LETTERS, words_per_skill=0
    )
    asked = draw_asked(seed, plan.SKILL, plan.NUM_ASKED)
    return Texts(
        asked=asked,
        samples=read_samples(asked, tokenizer),
        prose=read_samples([{"text": document} for document in drawn.held_out], tokenizer),
        alignment=[{"text": document} for document in drawn.learned],
    )


def measure_trial(trial: plan.Trial, seed: int) -> Row:
    """Measure one training at rates that are not chosen yet."""
    return train(trial.lesson, trial.rate, trial.alignment_rate, seed)


def measure_lesson(
    lesson: plan.Lesson, seed: int, *, aligned: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]]
) -> Row:
    """Measure one training at the rates that were chosen, or the base alone."""
    if lesson.way == plan.BASE:
        return measure_base(seed)
    alignment_rate = plan.chosen_alignment_rate(aligned, lesson.alignment)
    return train(lesson, plan.chosen_rate(trials, lesson), alignment_rate, seed)


def measure_base(seed: int) -> Row:
    """Return what the base makes of the same texts, untuned and whole."""
    base, texts = open_base(), open_texts(seed)
    found = measure(base.model, base.tokenizer, texts.samples, base.spec.generation.eos_token_ids)
    assert found.exact_match is not None
    return {
        "base_parameters": num_base_parameters(base.model),
        "prose_loss": round(mean_loss(base.model, texts.prose), 4),
        "loss": round(found.loss, 4),
        "right": found.exact_match,
    }


def train(lesson: plan.Lesson, rate: float, alignment_rate: float | None, seed: int) -> Row:
    """Train an adapter, and measure it on the base as the job's gate has it; where there is a copy, on that too."""
    texts = open_texts(seed)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        text = None if lesson.alignment is None else write_dataset(job / "data", texts.alignment)
        spec = make_spec(
            lesson, rate, seed, None if text is None else {"dataset": text, "learning_rate": alignment_rate}
        )
        learned = draw_lines(seed, plan.SKILL, plan.STEPS * plan.ROWS)
        found = run_in(job, spec, learned, texts.asked).evaluation
        assert found.exact_match_after is not None
        row: Row = {"loss": round(found.loss_after, 5), "right": found.exact_match_after}
        if not lesson.is_cut:
            return row | {"trained": num_parameters(job / "adapter")}
        on_copy = measure_copy(job, texts.samples, texts.prose)
    assert on_copy.adapted.exact_match is not None
    return row | {
        "trained": on_copy.num_trained,
        "base_parameters": on_copy.num_parameters,
        "prose_loss": round(on_copy.prose_loss, 4),
        "copy_loss": round(on_copy.adapted.loss, 5),
        "copy_right": on_copy.adapted.exact_match,
    }


def make_spec(lesson: plan.Lesson, rate: float, seed: int, alignment: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the JSON of a TrainingSpec: what is not here is the trainer's default."""
    spec: dict[str, Any] = {
        "steps": plan.STEPS,
        "batch_size": plan.ROWS,
        "checkpoint_steps": plan.STEPS,
        "max_length": plan.MAX_LENGTH,
        "seed": seed,
        "optimizer": {"learning_rate": rate},
    }
    if lesson.quantization != "none":
        spec["quantization"] = lesson.quantization
    lora = {"rank": plan.RANK}
    if not lesson.is_cut:
        return {**spec, "method": "TRAINING_METHOD_LORA", "lora": lora}
    loram: dict[str, Any] = {
        "lora": lora,
        "pruning": f"LORAM_PRUNING_{plan.PRUNINGS[lesson.way]}",
        "layers": plan.cut_layers(open_base().model.config.num_hidden_layers),
    }
    loram |= {"pattern": plan.PATTERN} if lesson.ratio is None else {"ratio": lesson.ratio}
    if lesson.way != plan.RANDOM:
        loram["calibration_samples"] = plan.CALIBRATION_SAMPLES
    if alignment is not None:
        assert lesson.alignment is not None
        size = {"steps": plan.ALIGNMENT_STEPS, "batch_size": plan.ALIGNMENT_ROWS}
        loram["alignment"] = {**alignment, **size, **plan.ALIGNMENTS[lesson.alignment]}
    return {**spec, "method": "TRAINING_METHOD_LORAM", "loram": loram}


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__, has_subject=True)
    aligned = tune(plan.list_alignment_trials(), measure_trial, options)
    trials = tune(plan.list_trials(aligned), measure_trial, options)
    measure_chosen = partial(measure_lesson, aligned=aligned, trials=trials)
    cells = measure_cells((plan.Lesson(plan.BASE), *plan.list_lessons()), measure_chosen, options)
    config = open_base().model.config
    setting = {
        "subject": subject_facts(),
        "steps": plan.STEPS,
        "rows": plan.ROWS,
        "asked": plan.NUM_ASKED,
        "prose_letters": plan.PROSE_LETTERS,
        "alignment": {
            "steps": plan.ALIGNMENT_STEPS,
            "rows": plan.ALIGNMENT_ROWS,
            "window": plan.MAX_LENGTH,
            "letters": plan.ALIGNMENT_LETTERS,
        },
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "ffn_channels": config.intermediate_size,
    }
    write("quality_loram", {"setting": setting, "aligned": aligned, "trials": trials, "cells": cells}, options)


if __name__ == "__main__":
    main()
