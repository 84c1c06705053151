"""An adapter that is not in memory is read once on its way to the device: its sizes are known without its files."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from adapter_files import spec_of
from architectures import build_model
from kind_adapters import layer_linears, make_goat, make_loram, make_s2ft
from motley_adapters.cache import AdapterCache
from motley_adapters.directories import AdapterDirectories
from motley_adapters.errors import AdapterError
from motley_adapters.extents import ExtentAllocator
from motley_adapters.loading import Loaded, LoadFailed, LoadJob, Measured, MeasureJob, PartLoader, Result, extent_sizes
from motley_adapters.peft_files import LoraPair, write_peft_lora
from motley_adapters.spec import Adapter
from motley_bases.spec import BaseSpec
from motley_kernels.adapter_delta.pool import UnitPool

KINDS = ("lora", "s2ft", "goat", "loram")


class CountingSource:
    """Read directories, and count how often."""

    def __init__(self, directories: AdapterDirectories) -> None:
        self.directories = directories
        self.num_reads: Counter[str] = Counter()

    def load(self, digest: str) -> Adapter:
        self.num_reads[digest] += 1
        return self.directories.load(digest)


def make_lora(directory: Path, base: BaseSpec, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    sides = {path: base.linears[path] for path in layer_linears(base)}
    pairs = {
        path: LoraPair(torch.randn(3, inputs, generator=generator), torch.randn(outputs, 3, generator=generator))
        for path, (inputs, outputs) in sides.items()
    }
    write_peft_lora(directory, pairs)
    return directory


class Desk:
    """A loader, and what it works on: a host cache that can hold nothing, and a pool."""

    def __init__(self, kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        model = build_model("llama", vocab_size=80)
        base = spec_of(model)
        make = {"lora": make_lora, "s2ft": make_s2ft, "loram": make_loram}
        folder = make_goat(directory, model, base, seed=1) if kind == "goat" else make[kind](directory, base, seed=1)
        self.source = CountingSource(AdapterDirectories(base))
        self.adapter = self.source.directories.read(folder)
        self.digest = self.adapter.spec.digest
        self.cache = AdapterCache(0, self.source)
        self.cache.put(self.adapter)
        self.pool = UnitPool(1 << 22, device=torch.device("cpu"), dtype=dtype)
        self.done = threading.Semaphore(0)
        self.loader = PartLoader(self.pool, self.cache, self.done.release)

    def do(self, job: MeasureJob | LoadJob) -> Result:
        self.loader.submit(job)
        assert self.done.acquire(timeout=10)
        (result,) = self.loader.finished()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sizes_of_an_adapter_that_is_not_in_memory_are_those_of_its_parts_and_cost_no_read(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    desk = Desk(kind, tmp_path, dtype)
    result = desk.do(MeasureJob(desk.digest))
    assert isinstance(result, Measured)
    assert result.sizes == {part.digest: extent_sizes(desk.pool, part) for part in desk.adapter.parts}
    assert desk.source.num_reads == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_not_in_memory_is_read_once_for_a_part(kind: str, tmp_path: Path) -> None:
    desk = Desk(kind, tmp_path)
    measured = desk.do(MeasureJob(desk.digest))
    assert isinstance(measured, Measured)
    extents = ExtentAllocator(desk.pool.num_bytes).allocate(measured.sizes[desk.digest])
    assert extents is not None
    loaded = desk.do(LoadJob(desk.digest, desk.digest, tuple(extents)))
    assert isinstance(loaded, Loaded)
    assert desk.source.num_reads == {desk.digest: 1}
    for path, unit in desk.adapter.units.items():
        for held, given in zip(loaded.units[path].tensors, unit.tensors, strict=True):
            assert torch.equal(held, given)


def test_what_is_not_known_cannot_be_measured(tmp_path: Path) -> None:
    desk = Desk("lora", tmp_path)
    desk.cache.remove(desk.digest)
    result = desk.do(MeasureJob(desk.digest))
    assert isinstance(result, LoadFailed)
    assert isinstance(result.error, AdapterError)
    assert result.error.reason == "ADAPTER_NOT_HELD"
