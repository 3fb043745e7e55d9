# SPDX-License-Identifier: Apache-2.0
"""The runtime on a GPU: pinned blocks, streams and events; the same contracts as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bytes
from tests.runtime.memory import table
from vericache._C import CopyEngine, CopyEngineOptions, HostPool, StagingRing
from vericache.errors import KernelError

pytestmark = pytest.mark.cuda
MIB = 1 << 20


def slow_kernel(milliseconds: float) -> None:
    """Keeps the current stream busy: spins for about so long at 1-2 GHz."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


def host_tensor(pool: HostPool, nbytes: int) -> Tensor:
    """A tensor in the pool's pinned memory, filled with known bytes."""
    tensor = torch.from_numpy(pool.view(pool.allocate(nbytes), nbytes))
    generator = torch.Generator().manual_seed(nbytes)
    tensor.copy_(torch.randint(0, 165, (nbytes,), generator=generator).to(torch.uint8))
    return tensor


@pytest.fixture
def pool() -> HostPool:
    return HostPool(capacity=256 * MIB, block_bytes=16 * MIB, device=0)


@pytest.mark.parametrize("nbytes", [1, 61, 4097, 4 * MIB])
def test_there_and_back(pool: HostPool, nbytes: int) -> None:
    assert pool.stats().pinned
    engine = CopyEngine(0, CopyEngineOptions(timing=True))
    source, back = host_tensor(pool, nbytes), torch.zeros(nbytes, dtype=torch.uint8)
    first, second = (torch.full((nbytes + 64,), 165, dtype=torch.uint8, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    up = engine.submit(table((source.data_ptr(), first.data_ptr() + 3, nbytes)), "h2d")
    over = engine.submit(table((first.data_ptr(), second.data_ptr(), nbytes + 64)), "d2d", after=up)
    engine.wait(engine.submit(table((second.data_ptr() + 3, back.data_ptr(), nbytes)), "d2h", after=over))
    assert_same_bytes(back, source)
    edge = second.cpu()
    assert (edge[:3] == 165).all()
    assert (edge[3 + nbytes :] == 165).all(), "bytes outside the row were written"
    for direction in ("h2d", "d2d", "d2h"):
        assert engine.counters(direction).jobs == 1
        assert engine.counters(direction).busy_seconds > 0
    assert engine.counters("h2d").bytes == nbytes


def test_a_store_follows_the_compute_stream(pool: HostPool) -> None:
    """The page is written by a kernel that has not run yet when its copy is submitted."""
    engine = CopyEngine(0)
    host = host_tensor(pool, MIB)
    page = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    slow_kernel(30)
    page.fill_(7)
    stream = torch.cuda.current_stream().cuda_stream
    ticket = engine.submit(table((page.data_ptr(), host.data_ptr(), MIB)), "d2h", after_stream=stream)
    assert not engine.ready(ticket), "the copy did not wait for the compute stream"
    engine.wait(ticket)
    assert (host == 7).all()


def test_without_after_stream_the_copy_is_early(pool: HostPool) -> None:
    """Negative control of the test above."""
    engine = CopyEngine(0)
    host = host_tensor(pool, MIB)
    page = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    slow_kernel(100)
    page.fill_(7)
    engine.wait(engine.submit(table((page.data_ptr(), host.data_ptr(), MIB)), "d2h"))
    assert (host == 0).all()


def test_compute_waits_for_the_copy_without_the_host(pool: HostPool) -> None:
    engine = CopyEngine(0)
    source = host_tensor(pool, 64 * MIB)
    target = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    ticket = engine.submit(table((source.data_ptr(), target.data_ptr(), 64 * MIB)), "h2d")
    engine.wait_on_stream(ticket, torch.cuda.current_stream().cuda_stream)
    read = target.clone()
    assert_same_bytes(read.cpu(), source)


def test_a_slot_is_overwritten_only_after_its_last_read(pool: HostPool) -> None:
    """Many laps of a small ring behind slow readers: each reader finds its own slot's bytes."""
    engine = CopyEngine(0)
    buffer = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda")
    ring = StagingRing(buffer.data_ptr(), 3 * MIB, 0)
    sources = [host_tensor(pool, MIB) for _ in range(4)]
    for i, source in enumerate(sources):
        source.fill_(i + 1)
    compute = torch.cuda.Stream()
    reads: list[tuple[int, Tensor]] = []
    torch.cuda.synchronize()
    with torch.cuda.stream(compute):
        for lap in range(24):
            slot = ring.acquire(MIB)
            assert slot >= 0, "released slots are free for planning at once"
            rows = table((sources[lap % 4].data_ptr(), ring.address(slot), MIB))
            engine.submit(rows, "h2d", ring=ring, slot=slot)
            ring.wait_on_stream(slot, compute.cuda_stream)
            slow_kernel(2)
            at = ring.address(slot) - buffer.data_ptr()
            reads.append((lap % 4 + 1, buffer[at : at + MIB].clone()))
            ring.release(slot, compute.cuda_stream)
    compute.synchronize()
    for want, read in reads:
        assert (read == want).all(), "a slot was overwritten before its reader had run"


def test_a_failed_copy_leaves_the_engine_and_cuda_well(pool: HostPool) -> None:
    # Injected: a wild address given to CUDA is taken for pageable host memory and ends the process.
    engine = CopyEngine(0, CopyEngineOptions(fail_after=0))
    source = host_tensor(pool, MIB)
    target = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    bad = engine.submit(table((source.data_ptr(), target.data_ptr(), MIB)), "h2d")
    good = engine.submit(table((source.data_ptr(), target.data_ptr(), MIB)), "h2d")
    for _ in range(2):
        with pytest.raises(KernelError, match="failure injected"):
            engine.wait(bad)
    engine.wait(good)
    assert_same_bytes(target.cpu(), source)
    assert engine.counters("h2d").failed == 1
    torch.ones(4, device="cuda").sum().item()  # a left-over CUDA error would surface here


def test_cpu_hooks_are_refused() -> None:
    with pytest.raises(KernelError, match="hooks of the CPU copy engine"):
        CopyEngine(0, CopyEngineOptions(delay_us_max=1))
