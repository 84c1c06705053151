"""Time the adapter delta on this CPU, beside a loop over adapters and beside the base Linear.

Run: python benchmarks/adapter_delta.py [--threads N]. Sixteen decode tokens under 1, 4 or 16 distinct adapters: rank-16
LoRA, then LoRA, S2FT on either side and GOAT mixed at about the same bytes. `replanned` is `grouped` right after a
change of composition, at a Linear whose structure the batch has met before. Each figure is the best of several rounds,
taken by turns so that the columns share the machine's moods; each call takes another of many layers, so that factors
come from memory as in a real step and not from a warm cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

# Before torch: barriers that spin long make neighbours part of the figure, and those that sleep at once cost wake-ups.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from motley_kernels.adapter_delta.pool import UnitPool, write_units
from motley_kernels.testing import draw_goat, draw_lora, draw_s2ft_input, draw_s2ft_output
from torch import Generator, Tensor

NUM_TOKENS, RANK, NUM_LAYERS = 16, 16, 24
WIDTHS = ((768, 768), (768, 2048), (2048, 768))
DISTINCT = (1, 4, 16)
NUM_EXPERTS = 4


@dataclass(frozen=True, slots=True)
class Layer:
    """One Linear with its bound units."""

    weight: Tensor
    units: UnitTable


def draw_like_lora(kind: int, in_features: int, out_features: int, generator: Generator) -> DeltaUnit:
    """Draw a unit of one of four kinds, in about the bytes of a LoRA of RANK."""
    num_elements = RANK * (in_features + out_features)
    if kind == 1:
        return draw_s2ft_input(num_elements // out_features, in_features, out_features, generator)
    if kind == 2:
        return draw_s2ft_output(num_elements // in_features, in_features, out_features, generator)
    if kind == 3:
        expert_rank = (num_elements - NUM_EXPERTS * in_features) // (NUM_EXPERTS * (in_features + out_features))
        return draw_goat(NUM_EXPERTS, expert_rank, 2, in_features, out_features, generator)
    return draw_lora(RANK, in_features, out_features, generator)


def make_layers(in_features: int, out_features: int, num_distinct: int, num_kinds: int) -> list[Layer]:
    """Draw layers whose units lie in one pool, adapter by adapter at each layer."""
    generator = Generator().manual_seed(0)
    drawn = [
        replace(draw_like_lora(slot % num_kinds, in_features, out_features, generator), scaling=2.0)
        for _ in range(NUM_LAYERS)
        for slot in range(num_distinct)
    ]
    device = torch.device("cpu")
    pool = UnitPool(
        UnitPool(0, device=device, dtype=torch.float32).extent_bytes(drawn), device=device, dtype=torch.float32
    )
    placed = pool.place(0, drawn)
    write_units(placed, drawn)
    layers = []
    for layer in range(NUM_LAYERS):
        units = UnitTable(in_features, out_features)
        for slot in range(num_distinct):
            units.bind(slot, placed[layer * num_distinct + slot])
        layers.append(Layer(torch.randn(out_features, in_features, generator=generator).bfloat16(), units))
    return layers


def loop_over_adapters(y: Tensor, x: Tensor, units: UnitTable, rows: dict[int, Tensor]) -> None:
    """Add deltas one adapter after another, as a mixed batch is commonly done: gather, two products, scatter."""
    for slot, indices in rows.items():
        unit = units.units[slot]
        if unit.a is None or unit.b is None or unit.gate is not None:
            raise ValueError("the loop takes plain low-rank units alone")
        y[indices] += ((x[indices].float() @ unit.a.T) @ unit.b * unit.scaling).to(y.dtype)


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


def measure(in_features: int, out_features: int, num_distinct: int, num_kinds: int, rounds: int) -> dict[str, float]:
    """Time one shape with so many distinct adapters; `megabytes` is what their factors take at one layer."""
    layers = make_layers(in_features, out_features, num_distinct, num_kinds)
    generator = Generator().manual_seed(1)
    slots = [token % num_distinct for token in range(NUM_TOKENS)]
    sets = [((slot, 1.0),) for slot in slots]
    batch = DeltaBatch.from_sets(sets)
    others = (DeltaBatch.from_sets(sets), DeltaBatch.from_sets(sets))  # by turns: each call meets another than the last
    rows = {s: torch.tensor([t for t, slot in enumerate(slots) if slot == s]) for s in range(num_distinct)}
    x = torch.randn(NUM_TOKENS, in_features, generator=generator).bfloat16()
    y = torch.zeros(NUM_TOKENS, out_features).bfloat16()
    turns = [cycle(layers) for _ in range(4)]
    compositions = cycle([other for other in others for _ in layers])
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: torch.nn.functional.linear(x, next(turns[0]).weight),
        "grouped": lambda: add_delta(y, x, next(turns[1]).units, batch),
        "replanned": lambda: add_delta(y, x, next(turns[2]).units, next(compositions)),
    }
    if num_kinds == 1:
        calls["loop"] = lambda: loop_over_adapters(y, x, next(turns[3]).units, rows)
    best = best_times(calls, rounds)
    num_bytes = sum(unit.nbytes for unit in layers[0].units.units.values())
    return {**best, "megabytes": num_bytes / 1e6}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}, load {os.getloadavg()[0]:.1f}")
    print(f"{NUM_TOKENS} bf16 tokens, float32 factors, microseconds per call (best of {options.rounds})")
    columns = ("base", "grouped", "replanned", "loop")
    print(f"{'Linear':>12} {'kinds':>6} {'distinct':>8} {'MB':>6} " + " ".join(f"{name:>9}" for name in columns))
    with torch.inference_mode():
        for in_features, out_features in WIDTHS:
            for num_kinds in (1, 4):
                for num_distinct in DISTINCT[num_kinds // 4 :]:
                    best = measure(in_features, out_features, num_distinct, num_kinds, options.rounds)
                    shape = f"{in_features:>5} x {out_features:<5}{num_kinds:>6} {num_distinct:>8}"
                    print(
                        f"{shape} {best['megabytes']:>6.2f} "
                        + " ".join(f"{best[name] * 1e6:>9.0f}" if name in best else f"{'-':>9}" for name in columns)
                    )


if __name__ == "__main__":
    main()
