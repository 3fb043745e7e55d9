# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call launches on the GPU, how often and for how long, as torch's profiler sees them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a call; neighbours may overlap, so times can add up to more than the call."""

    name: str
    count: int
    us: float

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"us": round(self.us, 1)}


def short(name: str) -> str:
    """A kernel's name without return type, namespaces of ours and argument list."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("vericache::cuda::", "")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"\s+", " ", name)[:120]


def trace(call: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, microseconds) of everything the call runs on the GPU, in order of start."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(short(e.name), e.time_range.end - e.time_range.start) for e in events]


def kernels_of(call: Callable[[], object], minus: Callable[[], object] | None = None) -> list[Kernel]:
    """The kernels of a call, in order of first launch.

    Args:
        call: what to look at; it launches on the current stream.
        minus: a call whose launches are taken off, such as the same without the part in question.
    """
    counts: Counter[str] = Counter()
    us: Counter[str] = Counter()
    for name, time in trace(call):
        counts[name] += 1
        us[name] += time
    for name, time in trace(minus) if minus is not None else []:
        counts[name] -= 1
        us[name] -= time
    return [Kernel(name, count, us[name]) for name, count in counts.items() if count > 0]
