"""Every cell of a script under every seed, several at a time, and what each gave side by side, in one result file.

Owns the command line that all scripts share, the processes and the file. A process takes one thread, so that a figure
does not depend on how many there are. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).parents[1]))

from machine import RESULTS, describe_machine
from subject import CPU, EMBEDDED, GPU, LARGER, TRAINING, choose, sees_gpu, use

SEEDS = (1, 2, 3, 4, 5)
TUNING_SEED = 0  # of no other measurement
MOST_ON_GPU = 4  # processes, each with its own copy of the base

Cell = TypeVar("Cell")
Row = dict[str, float]


def parse_options(doc: str | None, *, has_subject: bool = False) -> argparse.Namespace:
    """Read the command line; `seeds` is the seeds themselves, `out` None where nothing is to be written.

    Semantics: `began` is when, on the monotonic clock; `subject` what is measured on, which the command line chooses
    where a script `has_subject`, and otherwise is the embedded base on the CPU.
    Effects: trains the subject at first need, and makes it this process's.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer write nothing, unless --out is given")
    parser.add_argument("--jobs", type=int, help=f"processes; one for each core, and on a GPU {MOST_ON_GPU} at most")
    parser.add_argument("--out", type=Path, help="instead of the file that the page is made from")
    if has_subject:
        parser.add_argument("--subject", choices=(EMBEDDED, LARGER), help=f"{LARGER} where there is a GPU")
        parser.add_argument("--device", choices=(CPU, GPU))
        parser.add_argument("--training", type=shlex.split, help="what recipes/tiny/train_base.py is told instead")
    options = parser.parse_args()
    if not 1 <= options.seeds <= len(SEEDS):
        parser.error(f"--seeds is 1 to {len(SEEDS)}")
    options.seeds = SEEDS[: options.seeds]
    if not has_subject:
        vars(options).update(subject=EMBEDDED, device=CPU, training=None)
    elif options.device == GPU and not sees_gpu():
        parser.error("torch sees no GPU")
    options.subject = choose(options.subject, options.device, options.training or TRAINING)
    use(options.subject)
    if has_subject:
        print(f"measuring on {options.subject.directory}, on {options.subject.device}")
    if options.jobs is None:
        num_cores = len(os.sched_getaffinity(0))
        options.jobs = num_cores if options.subject.device == CPU else min(num_cores, MOST_ON_GPU)
    options.began = time.monotonic()
    return options


def measure_cells(
    cells: Sequence[Cell],
    measure: Callable[[Cell, int], Row],
    options: argparse.Namespace,
    *,
    is_alone: bool = False,
) -> list[dict[str, Any]]:
    """Measure all cells, and return each with what it gave: by name, a figure for every seed, in their order.

    Semantics: `measure` runs in processes of their own, which begin with those of the first cells; where `is_alone`,
    every cell and seed in one of its own.
    """
    began, rows = time.monotonic(), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.jobs, context, use, (options.subject,), max_tasks_per_child=1 if is_alone else None
    ) as pool:
        started = {
            pool.submit(measure, cell, seed): (place, seed)
            for place, cell in enumerate(cells)
            for seed in options.seeds
        }
        for future in as_completed(started):
            place, seed = started[future]
            rows[place, seed] = future.result()
            minutes = (time.monotonic() - began) / 60
            print(f"{len(rows)}/{len(started)} {minutes:.1f} min: seed {seed}, {cells[place]}: {rows[place, seed]}")
            sys.stdout.flush()
    return [
        asdict(cell)  # type: ignore[call-overload]
        | {name: [rows[place, seed][name] for seed in options.seeds] for name in rows[place, options.seeds[0]]}
        for place, cell in enumerate(cells)
    ]


def tune(
    cells: Sequence[Cell], measure: Callable[[Cell, int], Row], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure cells under the seed that is for choosing alone."""
    return measure_cells(cells, measure, argparse.Namespace(**vars(options) | {"seeds": (TUNING_SEED,)}))


def write(name: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the result file beside the machine it was measured on and the minutes, where one is to be written."""
    is_whole = options.seeds == SEEDS and not options.training
    path = options.out or (RESULTS / f"{name}{options.subject.suffix}.json" if is_whole else None)
    if path is None:
        print(f"{len(options.seeds)} of {len(SEEDS)} seeds, or a base of another training: nothing written")
        return
    machine = describe_machine() | {"processes": options.jobs}
    setting = result["setting"] | {"minutes": round((time.monotonic() - options.began) / 60, 1)}
    whole = {"machine": machine, "seeds": options.seeds, **result, "setting": setting}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"wrote {path}")
