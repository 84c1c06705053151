"""Parts on a GPU: what arrives is what was sent, in the base's dtype, before its first use and not after its last."""

from __future__ import annotations

import threading

import pytest
import torch
from counting_observer import CountingObserver
from motley_adapters.cache import AdapterCache
from motley_adapters.demand import demand_of
from motley_adapters.residency import Residency
from motley_adapters.spec import Adapter, AdapterSpec
from motley_bases.linear import DeltaBinding, DeltaSites
from motley_kernels.adapter_delta import DeltaUnit, UnitTable
from motley_kernels.adapter_delta.pool import UnitPool
from motley_kernels.adapter_delta.types import Gate

CUDA = torch.device("cuda")
WIDTH, RANK, NUM_ADAPTERS = 1024, 16, 12
PATHS = ("model.layers.0.down_proj", "model.layers.1.down_proj", "model.layers.1.up_proj")


def make_adapter(index: int) -> Adapter:
    """Make an adapter of random factors, with a router and channels in one place each."""
    generator = torch.Generator().manual_seed(index)
    a, b = (torch.randn(RANK, WIDTH, generator=generator) for _ in range(2))
    channels = torch.arange(0, 2 * RANK, 2, dtype=torch.int32)
    router = torch.randn(4, WIDTH, generator=generator)
    units = {
        PATHS[0]: DeltaUnit(a, b, 0.5),
        PATHS[1]: DeltaUnit(a, b, 1.0, gate=Gate(router, 2)),
        PATHS[2]: DeltaUnit(None, b, 1.0, inputs=channels),
    }
    return Adapter(AdapterSpec(f"adapter {index}", "mixed", {}, {}, "undeclared", 0), units)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whatever_comes_and_goes_each_adapter_is_used_with_its_own_numbers(dtype: torch.dtype) -> None:
    tables = {path: UnitTable(WIDTH, WIDTH) for path in PATHS}
    sites = DeltaSites(tables, DeltaBinding())
    adapters = [make_adapter(index) for index in range(NUM_ADAPTERS)]
    cache, woken, observer = AdapterCache(2**28), threading.Semaphore(0), CountingObserver()
    for adapter in adapters:
        cache.put(adapter)
    measure = UnitPool(0, device=CUDA, dtype=dtype)
    room = 3 * sum(measure.extent_bytes([unit]) for unit in adapters[0].units.values())
    pool = UnitPool(room, device=CUDA, dtype=dtype)
    residency = Residency(sites, pool, cache, observer, woken.release, poison=True)
    wrong = torch.zeros((), device=CUDA)
    for turn in range(4 * NUM_ADAPTERS):
        adapter = adapters[turn * 5 % NUM_ADAPTERS]
        demand = demand_of([(adapter.spec, 1.0)])
        while not residency.is_ready(demand):
            residency.prefetch(demand, 0)
            assert woken.acquire(timeout=20)
            assert residency.poll() == {}
        pins = residency.pin(demand)
        ((slot, _),) = pins.members
        for path, table in tables.items():
            table.await_arrival(slot)
            for there, sent in zip(table.units[slot].tensors, adapter.units[path].tensors, strict=True):
                assert there.device.type == "cuda"
                wrong += (there != sent.to(CUDA).to(there.dtype)).sum()
        pins.release()
        residency.check_integrity()
    assert float(wrong) == 0
    assert observer.num_evictions > NUM_ADAPTERS
