"""Every cell of a subject under every seed, several at a time, and what each gave side by side, in one result file.

Owns the command line that all subjects share, the processes and the file. A process takes one thread, so that a figure
does not depend on how many there are. Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).parents[1]))

from machine import RESULTS, describe_machine

SEEDS = (1, 2, 3, 4, 5)

Cell = TypeVar("Cell")
Row = dict[str, float]


def parse_options(doc: str | None) -> argparse.Namespace:
    """Read the command line; `seeds` is the seeds themselves, `out` None where nothing is to be written.

    Semantics: `began` is when, on the monotonic clock.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="fewer write nothing, unless --out is given")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="instead of the file that the page is made from")
    options = parser.parse_args()
    if not 1 <= options.seeds <= len(SEEDS):
        parser.error(f"--seeds is 1 to {len(SEEDS)}")
    options.seeds = SEEDS[: options.seeds]
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
    with ProcessPoolExecutor(options.jobs, context, max_tasks_per_child=1 if is_alone else None) as pool:
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


def write(name: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the result file beside the machine it was measured on and the minutes, where one is to be written."""
    path = options.out or (RESULTS / f"{name}.json" if options.seeds == SEEDS else None)
    if path is None:
        print(f"{len(options.seeds)} of {len(SEEDS)} seeds: nothing written")
        return
    machine = describe_machine() | {"processes": options.jobs}
    setting = result["setting"] | {"minutes": round((time.monotonic() - options.began) / 60, 1)}
    whole = {"machine": machine, "seeds": options.seeds, **result, "setting": setting}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"wrote {path}")
