"""How S2FT learns, forgets and fuses beside LoRA, and which channels it should take.

Every seed has lines of its own: of each skill to learn from, and words to be asked about that no line to learn from may
have. Each adapter comes out of a training job in float32 on one thread, by the trainer's own code, and is measured as
its files say. Learning rates are chosen first, under a seed that nothing else is measured by.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import s2ft_plan as plan
from cells import Row, measure_cells, parse_options, tune, write
from embedded import NUM_SKILLS, Line, ask, draw_asked, draw_lines, draw_texts
from jobs import num_parameters, open_base, read_samples, run_job, subject_facts
from motley_adapters.reader import inspect_adapter, read_adapter
from motley_trainer.data.samples import Sample
from motley_trainer.job.evaluation import mean_loss, measure
from motley_trainer.methods.s2ft_selection import num_items
from wearing import wear

Trials = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Texts:
    """One seed's lines: by skill, those that the base is asked; and what it knows, for what becomes of that."""

    asked: Mapping[str, list[Line]]
    known: tuple[Sample, ...]
    prose: tuple[Sample, ...]


@cache
def open_texts(seed: int) -> Texts:
    """Make one seed's texts, once in a process."""
    tokenizer = open_base().tokenizer
    drawn = draw_texts(
        seed, learned_letters=0, held_out_letters=plan.PROSE_LETTERS, words_per_skill=plan.NUM_KNOWN_ASKED
    )
    known = [line for skill, words in drawn.words.items() for line in ask(skill, words)]
    return Texts(
        asked={skill: draw_asked(seed, skill, plan.NUM_ASKED) for skill in dict.fromkeys((*plan.SKILLS, *plan.FUSED))},
        known=read_samples(known, tokenizer),
        prose=read_samples([{"text": document} for document in drawn.held_out], tokenizer),
    )


def measure_trial(trial: plan.Trial, seed: int) -> Row:
    """Measure one training at a rate that is not chosen yet."""
    with tempfile.TemporaryDirectory() as folder:
        return train(plan.Lesson(trial.way, trial.skill), trial.rate, seed, Path(folder, "adapter"))


def measure_lesson(lesson: plan.Lesson, seed: int, *, trials: Trials, folder: Path) -> Row:
    """Measure one training, and keep its adapter for those that are fused; or the base alone."""
    if lesson.way is None:
        return measure_known((), seed)
    return train(lesson, plan.chosen_rate(trials, lesson.way, lesson.skill), seed, adapter_path(folder, lesson, seed))


def train(lesson: plan.Lesson, rate: float, seed: int, adapter: Path, apart_from: Sequence[Path] = ()) -> Row:
    """Train an adapter and measure what it does: to its skill as the job's gate has it, and to what the base knows."""
    known_every = plan.KNOWN_EVERY if lesson.is_mixed else 0
    learned = draw_lines(seed, lesson.skill, plan.STEPS * plan.ROWS, known_every=known_every)
    spec = make_spec(str(lesson.way), rate, seed, apart_from)
    found = run_job(spec, learned, open_texts(seed).asked[lesson.skill], adapter, apart_from).evaluation
    assert found.exact_match_before is not None
    assert found.exact_match_after is not None
    return {
        "parameters": num_parameters(adapter),
        "loss_before": round(found.loss_before, 4),
        "loss": round(found.loss_after, 5),
        "right_before": found.exact_match_before,
        "right": found.exact_match_after,
        **measure_known((adapter,), seed),
    }


def make_spec(way: str, rate: float, seed: int, apart_from: Sequence[Path]) -> dict[str, Any]:
    """Return the JSON of a TrainingSpec: what is not here is the trainer's default."""
    spec: dict[str, Any] = {
        "steps": plan.STEPS,
        "batch_size": plan.ROWS,
        "checkpoint_steps": plan.STEPS,
        "seed": seed,
        "optimizer": {"learning_rate": rate},
    }
    if way == plan.LORA:
        return {**spec, "method": "TRAINING_METHOD_LORA", "lora": {"rank": plan.RANK}}
    if way == plan.LORA_THERE:
        there = {"rank": plan.RANK_THERE, "target_modules": ["o_proj", "down_proj"]}
        return {**spec, "method": "TRAINING_METHOD_LORA", "lora": there}
    score, order = plan.SELECTIONS[way]
    o_share, down_share = plan.shares(open_base().model.config.hidden_size)
    channels = {
        "o_share": o_share,
        "down_share": down_share,
        "score": f"CHANNEL_SCORE_{score}",
        "order": f"CHANNEL_ORDER_{order}",
        "disjoint_from": [path.name for path in apart_from],
    }
    return {**spec, "method": "TRAINING_METHOD_S2FT", "s2ft": channels}


def measure_fusion(fusion: plan.Fusion, seed: int, *, trials: Trials, folder: Path) -> Row:
    """Measure two adapters on the base at once, and beside it each alone."""
    lessons = [plan.Lesson(fusion.way, skill, is_mixed=True) for skill in plan.FUSED]
    first, second = (adapter_path(folder, lesson, seed) for lesson in lessons)
    if fusion.is_disjoint:
        second = folder / f"disjoint {seed}"
        train(lessons[1], plan.chosen_rate(trials, fusion.way, lessons[1].skill), seed, second, (first,))
    row: Row = {}
    for skill, alone in zip(plan.FUSED, (first, second), strict=True):
        for told, worn in (("", (first, second)), ("alone_", (alone,))):
            loss, right = measure_skill(worn, skill, seed)
            row |= {f"{told}loss_{skill}": loss, f"{told}right_{skill}": right}
    return row | measure_known((first, second), seed) | {"shared": num_shared(first, second)}


def measure_skill(adapters: Sequence[Path], skill: str, seed: int) -> tuple[float, float]:
    """Return the loss of a skill's answers under adapters, and the share of them that is exactly right."""
    base = open_base()
    samples = read_samples(open_texts(seed).asked[skill], base.tokenizer)
    worn = [(read_adapter(path, base.spec), 1.0) for path in adapters]
    with wear(base.model, worn):
        found = measure(base.model, base.tokenizer, samples, base.spec.generation.eos_token_ids)
    assert found.exact_match is not None
    return round(found.loss, 5), found.exact_match


def measure_known(adapters: Sequence[Path], seed: int) -> Row:
    """Return what is left of the base's own skills and prose under adapters."""
    base, texts = open_base(), open_texts(seed)
    worn = [(read_adapter(path, base.spec), 1.0) for path in adapters]
    with wear(base.model, worn):
        found = measure(base.model, base.tokenizer, texts.known, base.spec.generation.eos_token_ids)
        prose = mean_loss(base.model, texts.prose)
    assert found.exact_match is not None
    return {"known_loss": round(found.loss, 5), "known_right": found.exact_match, "prose_loss": round(prose, 4)}


def num_shared(first: Path, second: Path) -> int:
    """Return how many channels two adapters both have: none, if one of them has no channels at all."""
    spec = open_base().spec
    one, other = (inspect_adapter(path, spec).spec.channels for path in (first, second))
    return sum(len(set(one[path].indices) & set(other[path].indices)) for path in one.keys() & other.keys())


def adapter_path(folder: Path, lesson: plan.Lesson, seed: int) -> Path:
    """Return where a lesson's adapter is kept while the script runs."""
    return folder / f"{lesson.way} {lesson.skill} {'mixed' if lesson.is_mixed else 'alone'} {seed}"


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__, has_subject=True)
    trials = tune(plan.list_trials(), measure_trial, options)
    with tempfile.TemporaryDirectory() as kept:
        more: dict[str, Any] = {"trials": trials, "folder": Path(kept)}
        lessons = measure_cells((plan.Lesson(), *plan.list_lessons()), partial(measure_lesson, **more), options)
        fusions = measure_cells(plan.FUSIONS, partial(measure_fusion, **more), options)
    config = open_base().model.config
    o_share, down_share = plan.shares(config.hidden_size)
    setting = {
        "subject": subject_facts(),
        "steps": plan.STEPS,
        "rows": plan.ROWS,
        "asked": plan.NUM_ASKED,
        "known_asked": plan.NUM_KNOWN_ASKED * NUM_SKILLS,
        "prose_letters": plan.PROSE_LETTERS,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "ffn_channels": config.intermediate_size,
        "o_heads": num_items(o_share, config.num_attention_heads),
        "down_channels": num_items(down_share, config.intermediate_size),
    }
    write("quality_s2ft", {"setting": setting, "trials": trials, "cells": lessons, "fusions": fusions}, options)


if __name__ == "__main__":
    main()
