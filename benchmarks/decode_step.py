"""What adapters cost a decode step on a CPU: by how many are distinct, and by kind at the same bytes.

The work is that of serving_cpu.py: a random bf16 Llama of 100 M parameters. All requests are answered at once; a step
makes one token of each, and the median over `--steps` steps counts, everything included: scheduling, forward pass,
sampling. All settings take turns within one run, and so does reading memory. Two limits stand beside the measurements:

- growth over the step without adapters, beside 1.5 x (bytes of the distinct adapters / measured read bandwidth) + 1 ms;
- mixed kinds (LoRA, S2FT, GOAT with its residual, compact LoRAM) beside plain LoRA of the same bytes, at most 1.25.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import RESULTS, write_result
from motley_adapters.cache import AdapterCache
from motley_adapters.identity import adapter_digest
from motley_adapters.spec import Adapter, AdapterSpec, Part
from motley_bases.base import Base
from motley_bases.loader import load_base
from motley_kernels.adapter_delta.types import DeltaUnit, Gate
from motley_server.engine.core import EngineCore
from motley_server.engine.settings import EngineSettings
from motley_server.engine.types import GenerateRequest, SamplingParams, ServedAdapter
from rich.console import Console
from rich.table import Table
from serving_cpu import NullObserver, draw_prompts, make_base

RANK = 16
NUM_DISTINCT = (1, 4, 16, 64)
MakeUnit = Callable[[int, int, torch.Generator], DeltaUnit]


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Draw small factors."""
    return torch.randn(*shape, generator=generator) * 0.02


def draw_channels(generator: torch.Generator, num_channels: int, total: int) -> torch.Tensor:
    """Draw ascending channels."""
    return torch.randperm(total, generator=generator)[:num_channels].sort().values.to(torch.int32)


def make_lora(inputs: int, outputs: int, generator: torch.Generator) -> DeltaUnit:
    """Make a rank-16 pair: RANK * (inputs + outputs) numbers, which the other kinds come close to."""
    return DeltaUnit(draw(generator, RANK, inputs), draw(generator, RANK, outputs), 1.0)


def make_s2ft(inputs: int, outputs: int, generator: torch.Generator) -> DeltaUnit:
    """Make columns where the input is the wider side, rows where it is not."""
    budget = RANK * (inputs + outputs)
    if inputs >= outputs:
        chosen = draw_channels(generator, min(inputs, budget // outputs), inputs)
        return DeltaUnit(None, draw(generator, len(chosen), outputs), 1.0, inputs=chosen)
    chosen = draw_channels(generator, min(outputs, budget // inputs), outputs)
    return DeltaUnit(draw(generator, len(chosen), inputs), None, 1.0, outputs=chosen)


def make_goat(inputs: int, outputs: int, generator: torch.Generator) -> DeltaUnit:
    """Make four experts, two a token; their router takes the place of some rank."""
    rank, num_experts = 12, 4
    gate = Gate(torch.randn(num_experts, inputs, generator=generator) / inputs**0.5, 2)
    return DeltaUnit(draw(generator, rank, inputs), draw(generator, rank, outputs), 1.0, gate=gate)


def make_loram(inputs: int, outputs: int, generator: torch.Generator) -> DeltaUnit:
    """Make a pair over half of the wider side's channels."""
    if inputs > outputs:
        kept = draw_channels(generator, inputs // 2, inputs)
        rank = RANK * (inputs + outputs) // (len(kept) + outputs)
        return DeltaUnit(draw(generator, rank, len(kept)), draw(generator, rank, outputs), 1.0, inputs=kept)
    kept = draw_channels(generator, outputs // 2, outputs)
    rank = RANK * (inputs + outputs) // (inputs + len(kept))
    return DeltaUnit(draw(generator, rank, inputs), draw(generator, rank, len(kept)), 1.0, outputs=kept)


KINDS: dict[str, MakeUnit] = {"lora": make_lora, "s2ft": make_s2ft, "goat": make_goat, "loram": make_loram}


def make_adapter(base: Base, kind: str, seed: int, shared: tuple[Part, ...] = ()) -> Adapter:
    """Make a random adapter on all Linears of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    sides = {path: sides for path, sides in base.spec.linears.items() if path != base.spec.lm_head_path}
    units = {path: KINDS[kind](*sides[path], generator) for path in sorted(sides)}
    digest = adapter_digest(kind, units, tuple(part.digest for part in shared))
    ranks = {path: unit.rank for path, unit in units.items()}
    nbytes = sum(unit.nbytes for unit in units.values())
    digests = tuple(part.digest for part in shared)
    return Adapter(AdapterSpec(digest, kind, ranks, {}, "undeclared", nbytes, shared=digests), units, shared)


def make_residual(base: Base) -> Part:
    """Make what all GOAT adapters here share."""
    adapter = make_adapter(base, "lora", 10_000)
    return Part(adapter.spec.digest, adapter.units)


@dataclass(frozen=True, slots=True)
class Setting:
    """What one measurement serves: requests, and their adapters in turn."""

    num_requests: int
    adapters: tuple[Adapter, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all distinct parts."""
        return sum({part.digest: part.nbytes for adapter in self.adapters for part in adapter.parts}.values())


class Bench:
    """The engine, its steps driven by hand."""

    def __init__(self, base: Base, adapters: list[Adapter]) -> None:
        cache = AdapterCache(2**32)
        for adapter in adapters:
            cache.put(adapter)
        settings = EngineSettings(
            kv_cache_bytes=2**28, adapter_arena_bytes=3 * 2**29, max_running=64, token_budget=4096, prefix_cache=False
        )
        self.core = EngineCore(base, cache, settings, NullObserver())
        self.core.runner.warm_up()

    def step_seconds(self, setting: Setting, num_steps: int) -> list[float]:
        """Bring all requests to decode, then time steps."""
        prompts = draw_prompts()
        for index in range(setting.num_requests):
            served: tuple[ServedAdapter, ...] = ()
            if setting.adapters:
                spec = setting.adapters[index % len(setting.adapters)].spec
                served = (ServedAdapter("a", 1, spec.digest, 1.0, spec.trained_on, spec.kind),)
            sampling = SamplingParams(max_new_tokens=num_steps + 8)
            request = GenerateRequest(str(index), "local", tuple(prompts[index % len(prompts)]), sampling, served)
            assert self.core.add(request, time.monotonic()) is None
        made: set[str] = set()
        while len(made) < setting.num_requests:
            made.update(event.request_id for event in self.core.step())
        self.core.step()
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            self.core.step()
            seconds.append(time.perf_counter() - started)
        while self.core.has_work:
            self.core.step()
        return seconds


def read_seconds(data: torch.Tensor) -> float:
    """Time reading memory that no cache holds, with the threads that the engine has."""
    started = time.perf_counter()
    data.sum()
    return time.perf_counter() - started


def make_settings(base: Base) -> dict[str, Setting]:
    """Name every measurement."""
    loras = tuple(make_adapter(base, "lora", seed) for seed in range(max(NUM_DISTINCT)))
    shared = (make_residual(base),)
    mixed = tuple(
        make_adapter(base, kind, 100 + seed, shared if kind == "goat" else ())
        for seed, kind in enumerate(["lora", "s2ft", "goat", "loram"] * 4)
    )
    settings = {"base alone, 16 requests": Setting(16, ()), "base alone, 64 requests": Setting(64, ())}
    for num_distinct in NUM_DISTINCT:
        settings[f"{num_distinct} LoRA, 64 requests"] = Setting(64, loras[:num_distinct])
    settings["16 LoRA, 16 requests"] = Setting(16, loras[:16])
    settings["16 of mixed kinds, 16 requests"] = Setting(16, mixed)
    for kind in ("s2ft", "goat", "loram"):
        only = tuple(make_adapter(base, kind, 200 + seed, shared if kind == "goat" else ()) for seed in range(16))
        settings[f"16 {kind}, 16 requests"] = Setting(16, only)
    return settings


def summarize(settings: dict[str, Setting], seconds: dict[str, list[float]], bandwidth: float) -> dict[str, Any]:
    """Work out growth, its bound, and what a byte of each mixture costs beside a byte of plain LoRA."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows: dict[str, Any] = {}
    for name, setting in settings.items():
        growth = medians[name] - medians[f"base alone, {setting.num_requests} requests"]
        bound = 1.5 * setting.nbytes / bandwidth + 0.001
        rows[name] = {
            "step_ms": medians[name] * 1e3, "growth_ms": growth * 1e3, "bound_ms": bound * 1e3,
            "adapter_mb": setting.nbytes / 1e6,
        }  # fmt: skip
    plain = rows["16 LoRA, 16 requests"]
    for name, setting in settings.items():
        if setting.num_requests == 16 and setting.adapters:
            row = rows[name]
            row["growth_per_byte_over_lora"] = (row["growth_ms"] / row["adapter_mb"]) / (
                plain["growth_ms"] / plain["adapter_mb"]
            )
    return rows


def show(rows: dict[str, Any], bandwidth: float) -> None:
    """Print the table."""
    table = Table("setting", "step ms", "growth ms", "bound ms", "adapters MB", "per byte, over LoRA")
    for name, row in rows.items():
        ratio = row.get("growth_per_byte_over_lora")
        table.add_row(
            name, f"{row['step_ms']:.1f}", f"{row['growth_ms']:.1f}", f"{row['bound_ms']:.1f}",
            f"{row['adapter_mb']:.0f}", "" if ratio is None else f"{ratio:.2f}",
        )  # fmt: skip
    Console().print(table)
    print(f"read bandwidth: {bandwidth / 1e9:.1f} GB/s")


def plot(rows: dict[str, Any], path: Path) -> None:
    """Draw growth over the number of distinct adapters, beside its bound."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen = [rows[f"{count} LoRA, 64 requests"] for count in NUM_DISTINCT]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(NUM_DISTINCT, [row["growth_ms"] for row in chosen], marker="o", label="measured growth")
    axes.plot(NUM_DISTINCT, [row["bound_ms"] for row in chosen], linestyle="--", label="1.5 x bytes / bandwidth + 1 ms")
    axes.set(xscale="log", xticks=NUM_DISTINCT, xlabel="distinct rank-16 adapters among 64 requests", ylim=(0, None))
    axes.set_xticklabels([str(count) for count in NUM_DISTINCT])
    axes.set_ylabel("growth of the decode step, ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write the result file and its plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(make_base(Path(folder) / "base"), dtype="bfloat16", device=torch.device("cpu"))
    settings = make_settings(base)
    adapters = {adapter.spec.digest: adapter for setting in settings.values() for adapter in setting.adapters}
    bench = Bench(base, list(adapters.values()))
    data = torch.ones(2**28)
    reads: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(arguments.rounds):
        for name, setting in settings.items():
            seconds[name] += bench.step_seconds(setting, arguments.steps)
            reads.append(read_seconds(data))
    bandwidth = data.nbytes / statistics.median(reads)
    rows = summarize(settings, seconds, bandwidth)
    show(rows, bandwidth)
    path = write_result("decode_step", {"read_bandwidth_gb_per_s": bandwidth / 1e9, "settings": rows})
    plot(rows, RESULTS / "decode_step.png")
    bench.core.close()
    print(f"wrote {path.relative_to(Path.cwd())} and its plot")


if __name__ == "__main__":
    main()
