# SPDX-License-Identifier: Apache-2.0
"""The one way to time: warm up, repeat, report the median and the spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: of all repeats.
        low, high: the fastest and the slowest repeat.
        repeats: how many there were.
    """

    median: float
    low: float
    high: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3f} ms ({self.low * 1e3:.3f}-{self.high * 1e3:.3f}, {self.repeats} repeats)"


def measure(call: Callable[[], object], device: str, *, warmup: int = 3, repeats: int = 20) -> Timing:
    """Times a call.

    Args:
        call: what to time; on a GPU it launches on the current stream.
        device: `cpu` (wall clock) or `cuda` (events around each call).
        warmup: calls before the first timed one.
        repeats: timed calls.
    """
    for _ in range(warmup):
        call()
    seconds = _measure_cuda(call, repeats) if device.startswith("cuda") else _measure_cpu(call, repeats)
    return Timing(median(seconds), min(seconds), max(seconds), repeats)


def _measure_cpu(call: Callable[[], object], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _measure_cuda(call: Callable[[], object], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def graph_us(work: Callable[[int], object], launches: int, *, warmup: int = 3, replays: int = 9) -> float:
    """Median time in microseconds of one of ``launches`` calls ``work(i)`` in a CUDA graph, over its replays.

    As ``time_graph`` of bench/gpu/harness.cuh does it, for what is compared with the kernels timed there: each replay
    is waited for before the next.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            work(0)  # handles and modules are made before the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                work(i)
        seconds = [_measure_cuda(graph.replay, 1)[0] for _ in range(warmup + replays)]
    return median(seconds[warmup:]) * 1e6 / launches
