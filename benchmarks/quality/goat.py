"""How GOAT learns beside LoRA and beside a mixture from zero, and what its scale, balance loss and segments come to.

Every seed has lines of its own to learn from, and words to be asked about that no line to learn from may have. Each
adapter comes out of a training job in float32 on one thread, by the trainer's own code, and is measured as the job's
gate has it; mixtures from zero alone are put together here. Learning rates are chosen first, under a seed that nothing
else is measured by.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import goat_plan as plan
from cells import Row, measure_cells, parse_options, tune, write
from embedded import draw_asked, draw_lines
from goat_mixture import begin_as_lora, train_from
from jobs import num_parameters, open_base, run_job, subject_facts
from motley_adapters.formats import MANIFEST_FILE

Trials = Sequence[Mapping[str, Any]]


def measure_trial(trial: plan.Cell, seed: int) -> Row:
    """Measure one training at a rate that is not chosen yet."""
    assert trial.rate is not None
    return train(trial.way, trial.rate, seed)


def measure_cell(cell: plan.Cell, seed: int, *, trials: Trials) -> Row:
    """Measure one training at its rate, or at the one that was chosen."""
    return train(cell.way, plan.chosen_rate(trials, cell.way) if cell.rate is None else cell.rate, seed)


def train(way: str, rate: float, seed: int) -> Row:
    """Train an adapter, and measure how large it is, what it does, and which experts tokens went through."""
    open_base()  # and with it, take one thread
    learned = draw_lines(seed, plan.SKILL, plan.STEPS * plan.ROWS)
    asked = draw_asked(seed, plan.SKILL, plan.NUM_ASKED)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder, "adapter")
        if way in (plan.MIXTURE, plan.MIXTURE_PLAIN):
            found = train_from(begin_as_lora, make_spec(way, rate, seed), learned, asked, adapter)
        else:
            found = run_job(make_spec(way, rate, seed), learned, asked, adapter).evaluation
        sizes = read_sizes(adapter)
    assert found.exact_match_before is not None
    assert found.exact_match_after is not None
    return {
        **sizes,
        "loss_before": round(found.loss_before, 4),
        "loss": round(found.loss_after, 5),
        "right_before": found.exact_match_before,
        "right": found.exact_match_after,
    }


def make_spec(way: str, rate: float, seed: int) -> dict[str, Any]:
    """Return the JSON of a TrainingSpec: what is not here is the trainer's default."""
    spec: dict[str, Any] = {
        "steps": plan.STEPS,
        "batch_size": plan.ROWS,
        "checkpoint_steps": plan.STEPS,
        "seed": seed,
        "optimizer": {"learning_rate": rate},
    }
    if way in (plan.LORA, plan.LORA_LARGE):
        rank = plan.RANK if way == plan.LORA else plan.RANK_LARGE
        factors = {"rank": rank, "alpha": float(plan.PLAIN_SCALE * rank), "target_modules": list(plan.TARGETS)}
        return {**spec, "method": "TRAINING_METHOD_LORA", "lora": factors}
    experts = {
        "rank": plan.RANK,
        "experts": plan.EXPERTS,
        "top_k": plan.TOP_K,
        "rho": plan.RHO,
        "balance_loss": plan.BALANCE,
        "dropout": 0.0,  # as the LoRA has it
        "target_modules": list(plan.TARGETS),
        **plan.SETTINGS[way],
    }
    return {**spec, "method": "TRAINING_METHOD_GOAT", "goat": experts}


def read_sizes(adapter: Path) -> Row:
    """Return how many numbers were trained, and of experts where their tokens' shares lie, as the adapter tells."""
    told = json.loads((adapter / MANIFEST_FILE).read_text())["provenance"] if (adapter / MANIFEST_FILE).exists() else {}
    if "expert_shares" not in told:
        return {"parameters": num_parameters(adapter), "router_parameters": 0}
    return {
        "parameters": told["num_expert_parameters"],
        "router_parameters": told["num_router_parameters"],
        **spread_of(list(told["expert_shares"].values())),
    }


def spread_of(shares: Sequence[Sequence[float]]) -> Row:
    """Return how evenly tokens are spread: the mean over the Linears of an expert's least and greatest share, and those
    of all; how many experts an even spread that chance hits as often would have; how many experts are idle.

    Semantics: idle is an expert with less than a tenth of an even share.
    """
    return {
        "least": round(fmean(map(min, shares)), 4),
        "greatest": round(fmean(map(max, shares)), 4),
        "least_of_all": round(min(map(min, shares)), 4),
        "greatest_of_all": round(max(map(max, shares)), 4),
        "effective": round(fmean(1 / sum(share * share for share in of_linear) for of_linear in shares), 3),
        "idle": sum(share < plan.IDLE / len(of_linear) for of_linear in shares for share in of_linear),
    }


def main() -> None:
    """Measure, print as it goes, write the result file."""
    options = parse_options(__doc__, has_subject=True)
    trials = tune(plan.list_trials(), measure_trial, options)
    cells = measure_cells(plan.list_cells(), partial(measure_cell, trials=trials), options)
    config = open_base().model.config
    setting = {
        "subject": subject_facts(),
        "steps": plan.STEPS,
        "rows": plan.ROWS,
        "asked": plan.NUM_ASKED,
        "layers": config.num_hidden_layers,
        "sides": sorted({config.hidden_size, config.intermediate_size}),
    }
    write("quality_goat", {"setting": setting, "trials": trials, "cells": cells}, options)


if __name__ == "__main__":
    main()
