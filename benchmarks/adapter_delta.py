"""Time the adapter delta on this CPU, beside a loop over adapters and beside the base Linear.

Run: python benchmarks/adapter_delta.py [--threads N]. Sixteen decode tokens under 1, 4 or 16 distinct rank-16 adapters.
Each figure is the best of several rounds, taken by turns so that the columns share the machine's moods; each call takes
another of many layers, so that factors come from memory as in a real step and not from a warm cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: spinning barriers make neighbours part of the figure

import torch
from motley_kernels.adapter_delta import DeltaBatch, UnitTable, add_delta
from motley_kernels.testing import draw_unit
from torch import Generator, Tensor

NUM_TOKENS, RANK, NUM_LAYERS = 16, 16, 24
WIDTHS = ((768, 768), (768, 2048), (2048, 768))
DISTINCT = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear with its bound units."""

    weight: Tensor
    units: UnitTable


def loop_over_adapters(y: Tensor, x: Tensor, units: UnitTable, rows: dict[int, Tensor]) -> None:
    """Add deltas one adapter after another, as a mixed batch is commonly done: gather, two products, scatter."""
    for slot, indices in rows.items():
        unit = units.units[slot]
        hidden = torch.nn.functional.linear(x[indices].to(unit.a.dtype), unit.a)
        y[indices] += (torch.nn.functional.linear(hidden, unit.b) * unit.scaling).to(y.dtype)


def best_times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each call's best seconds, measured by turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(NUM_LAYERS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / NUM_LAYERS)
    return best


def measure(in_features: int, out_features: int, num_distinct: int, rounds: int) -> dict[str, float]:
    """Time one shape with so many distinct adapters."""
    generator = Generator().manual_seed(0)
    layers = []
    for _ in range(NUM_LAYERS):
        units = UnitTable(in_features, out_features)
        for slot in range(num_distinct):
            units.bind(slot, draw_unit(RANK, in_features, out_features, generator))
        layers.append(Layer(torch.randn(out_features, in_features, generator=generator).bfloat16(), units))
    slots = [token % num_distinct for token in range(NUM_TOKENS)]
    batch = DeltaBatch.from_sets([((slot, 1.0),) for slot in slots])
    rows = {s: torch.tensor([t for t, slot in enumerate(slots) if slot == s]) for s in range(num_distinct)}
    x = torch.randn(NUM_TOKENS, in_features, generator=generator).bfloat16()
    y = torch.zeros(NUM_TOKENS, out_features).bfloat16()
    turns = [cycle(layers) for _ in range(3)]
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: torch.nn.functional.linear(x, next(turns[0]).weight),
        "grouped": lambda: add_delta(y, x, next(turns[1]).units, batch),
        "loop": lambda: loop_over_adapters(y, x, next(turns[2]).units, rows),
    }
    return best_times(calls, rounds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    print(f"{NUM_TOKENS} bf16 tokens, float32 factors of rank {RANK}, microseconds per call (best of {options.rounds})")
    print(
        f"{'Linear':>12} {'distinct':>8} {'base':>8} {'grouped':>8} {'loop':>8} {'factor MB':>10} {'loop/grouped':>12}"
    )
    with torch.inference_mode():
        for in_features, out_features in WIDTHS:
            for num_distinct in DISTINCT:
                best = measure(in_features, out_features, num_distinct, options.rounds)
                megabytes = num_distinct * RANK * (in_features + out_features) * 4 / 1e6
                print(
                    f"{in_features:>5} x {out_features:<5}{num_distinct:>8} "
                    + " ".join(f"{best[name] * 1e6:>8.0f}" for name in ("base", "grouped", "loop"))
                    + f" {megabytes:>10.2f} {best['loop'] / best['grouped']:>12.1f}"
                )


if __name__ == "__main__":
    main()
