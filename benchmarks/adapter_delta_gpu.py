"""Time the adapter delta on a GPU at the shapes of an 8B model, beside the least time its bytes could take.

Run: python benchmarks/adapter_delta_gpu.py. 64 decode tokens in bfloat16 under one rank-16 adapter, under eight, and
under eight adapters of mixed kinds of about the same bytes; one figure for each group of Linears that share an input.
The floor is the bytes of the units, once, and of the inputs and outputs, over the memory's bandwidth as a copy of the
same run has it. Each call takes another layer, so that factors come from memory and not from a cache. One Linear of
each group is compared with the definition before anything is timed. Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from cuda_timing import copied_bytes_per_second, device_seconds, has_gpu, wall_seconds
from machine import write_result
from motley_kernels.adapter_delta import DeltaBatch, DeltaUnit, UnitTable, add_delta
from motley_kernels.testing import assert_close, draw_compact, draw_goat, draw_s2ft_input, draw_s2ft_output, draw_unit
from torch import Generator, Tensor

DTYPE = torch.bfloat16
NUM_TOKENS, RANK, NUM_LAYERS = 64, 16, 32
GROUPS = {  # of Linears that read one input: inputs, and the outputs of each
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ADAPTERS = {
    "one lora": ("lora",),
    "eight loras": ("lora",) * 8,
    "eight of mixed kinds": ("lora", "lora", "goat", "goat", "s2ft_input", "s2ft_output", "compact", "compact"),
}


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """One Linear's units, with the output that they add to."""

    units: UnitTable
    y: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """One layer's group of Linears."""

    x: Tensor
    linears: list[Linear]
    batch: DeltaBatch

    def add(self) -> None:
        """Add the deltas of the group."""
        for linear in self.linears:
            add_delta(linear.y, self.x, linear.units, self.batch)

    @property
    def num_bytes(self) -> int:
        """Count what must be read and written: units and inputs once, outputs twice."""
        units = sum(unit.nbytes for linear in self.linears for unit in linear.units.units.values())
        return units + self.x.nbytes + 2 * sum(linear.y.nbytes for linear in self.linears)


def draw_adapter(kind: str, in_features: int, out_features: int, generator: Generator) -> DeltaUnit:
    """Draw one adapter's unit, of about the bytes of a rank-16 one."""
    sides = (in_features, out_features, generator, DTYPE)
    if kind == "goat":
        return draw_goat(8, RANK // 8, 2, *sides)
    if kind == "s2ft_input":
        return draw_s2ft_input(RANK * (in_features + out_features) // out_features, *sides)
    if kind == "s2ft_output":
        return draw_s2ft_output(RANK * (in_features + out_features) // in_features, *sides)
    if kind == "compact":  # a quarter pruned, at a rank a third higher
        return draw_compact(RANK * 4 // 3, *sides, kept_inputs=in_features * 3 // 4, kept_outputs=out_features * 3 // 4)
    return draw_unit(RANK, *sides)


def draw_layers(group: str, kinds: tuple[str, ...], generator: Generator, device: torch.device) -> list[Layer]:
    """Draw every layer of one group; tokens take the adapters by turns."""
    in_features, outs = GROUPS[group]
    sets = [(((token % len(kinds), 1.0),), 1) for token in range(NUM_TOKENS)]
    batch = DeltaBatch.from_sequences(sets, device)
    layers = []
    for _ in range(NUM_LAYERS):
        linears = []
        for out_features in outs:
            units = UnitTable(in_features, out_features)
            for slot, kind in enumerate(kinds):
                units.bind(slot, draw_adapter(kind, in_features, out_features, generator).to(device))
            linears.append(Linear(units, torch.zeros(NUM_TOKENS, out_features, dtype=DTYPE, device=device)))
        x = torch.randn(NUM_TOKENS, in_features, generator=generator).to(device, DTYPE)
        layers.append(Layer(x, linears, batch))
    return layers


def check(layer: Layer) -> None:
    """Compare the first Linear's deltas with the definition.

    Raises: AssertionError where they differ.
    """
    linear = layer.linears[0]
    expected, out = torch.zeros_like(linear.y), torch.zeros_like(linear.y)
    add_delta(expected, layer.x, linear.units, layer.batch, implementation="reference")
    add_delta(out, layer.x, linear.units, layer.batch)
    assert_close(out, expected, DTYPE)


def measure(group: str, kinds: tuple[str, ...], bandwidth: float, device: torch.device) -> dict[str, Any]:
    """Check one group under some adapters, then time it; seconds are of one layer."""
    layers = draw_layers(group, kinds, Generator().manual_seed(0), device)
    check(layers[0])
    calls: list[Callable[[], object]] = [layer.add for layer in layers]
    seconds = device_seconds(calls)
    floor = layers[0].num_bytes / bandwidth
    return {
        "bytes": layers[0].num_bytes,
        "seconds": seconds,
        "seconds_with_launching": wall_seconds(calls),
        "floor_seconds": floor,
        "over_floor": seconds / floor,
    }


def main() -> None:
    """Measure every group, print the table, write the result."""
    if not has_gpu():
        return
    bandwidth = copied_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s; {NUM_TOKENS} tokens, one layer")
    print(f"{'adapters':>22} {'group':>8} {'MB':>7} {'us':>8} {'floor us':>9} {'/ floor':>8} {'launched us':>12}")
    results: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name, kinds in ADAPTERS.items():
            results[name] = {}
            for group in GROUPS:
                found = measure(group, kinds, bandwidth, torch.device("cuda"))
                results[name][group] = found
                print(
                    f"{name:>22} {group:>8} {found['bytes'] / 1e6:>7.2f} {found['seconds'] * 1e6:>8.1f} "
                    f"{found['floor_seconds'] * 1e6:>9.1f} {found['over_floor']:>8.2f} "
                    f"{found['seconds_with_launching'] * 1e6:>12.1f}"
                )
    path = write_result(
        "adapter_delta_gpu",
        {
            "triton": version("triton"),
            "tokens": NUM_TOKENS,
            "rank": RANK,
            "layers": NUM_LAYERS,
            "dtype": str(DTYPE).removeprefix("torch."),
            "copied_bytes_per_second": bandwidth,
            "adapters": results,
        },
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
