"""Time work on a CUDA device, and measure what that device can do: the floors that a kernel is held beside.

Work is captured in a graph, so that a figure is the device's and not the launcher's; callers make the work larger than
the device's cache, so that bytes come from memory as in a real step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 20
COPY_BYTES = 2**30
MATRIX = 8192


def has_gpu() -> bool:
    """Say whether torch can use a GPU; where not, print that nothing is measured."""
    if torch.cuda.is_available():
        return True
    print("No GPU that torch can use: nothing measured.")
    return False


def device_seconds(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
    """Return the median seconds that the device takes for one of these calls, run one after another from a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first calls compile and allocate, which a graph cannot hold
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = []
    for _ in range(rounds + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(taken[2:])


def wall_seconds(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
    """Return the median seconds for one of these calls as Python launches them, the launcher's own time included."""
    taken = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) / len(calls))
    return statistics.median(taken[2:])


def copied_bytes_per_second() -> float:
    """Measure the memory's bandwidth: bytes read and written by a copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / device_seconds([lambda: target.copy_(source)])


def multiplied_flops_per_second(dtype: torch.dtype) -> float:
    """Measure the rate of a large matrix product."""
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * MATRIX**3 / device_seconds([lambda: torch.mm(a, b, out=out)])
