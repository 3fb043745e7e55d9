# SPDX-License-Identifier: Apache-2.0
"""HostPool against a model in Python: extents never overlap, contents stay, accounting is exact."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vericache._C import HostPool, default_host_capacity
from vericache.errors import CapacityError, KernelError

PAGE = 4096
BLOCK = 16 * PAGE


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("allocate"), st.integers(1, 3 * BLOCK)),
            st.tuples(st.just("free"), st.integers(0, 99)),
            st.tuples(st.just("trim"), st.just(0)),
            st.tuples(st.just("reserve"), st.integers(1, 2 * BLOCK)),
        ),
        max_size=60,
    )
)
def test_against_model(steps: list[tuple[str, int]]) -> None:
    capacity = 6 * BLOCK
    pool = HostPool(capacity=capacity, block_bytes=BLOCK)
    live: dict[int, tuple[int, int]] = {}  # address -> (bytes, fill)
    peak = 0
    for number, (what, argument) in enumerate(steps):
        if what == "allocate":
            try:
                address = pool.allocate(argument)
            except CapacityError:
                # Only when no free extent is large enough and no block can be added even after trimming.
                assert pool.stats().largest_free < pages(argument)
                pool.trim()
                assert capacity - pool.stats().bytes_reserved < pages(argument)
                continue
            assert address % PAGE == 0
            for other, (nbytes, _) in live.items():
                assert address + argument <= other or other + pages(nbytes) <= address, "extents overlap"
            pool.view(address, argument)[:] = number % 251
            live[address] = (argument, number % 251)
        elif what == "free" and live:
            address = sorted(live)[argument % len(live)]
            nbytes, fill = live.pop(address)
            assert (pool.view(address, nbytes) == fill).all(), "a later allocation wrote into this one"
            pool.free(address)
        elif what == "trim":
            pool.trim()
        elif what == "reserve":
            try:
                pool.reserve(argument)
            except CapacityError:
                continue
            before = pool.stats().blocks
            assert pool.stats().largest_free >= pages(argument)
            assert pool.stats().blocks == before
        stats = pool.stats()
        used = sum(pages(nbytes) for nbytes, _ in live.values())
        peak = max(peak, used)
        assert (stats.bytes_in_use, stats.peak_in_use, stats.allocations) == (used, peak, len(live))
        assert used <= stats.bytes_reserved <= stats.capacity == capacity
    for address, (nbytes, fill) in live.items():
        assert (pool.view(address, nbytes) == fill).all()
        pool.free(address)
    pool.trim()
    assert (pool.stats().bytes_reserved, pool.stats().blocks, pool.stats().largest_free) == (0, 0, 0)


def test_nothing_is_taken_at_start_up() -> None:
    pool = HostPool(capacity=1 << 40, block_bytes=BLOCK)
    assert (pool.stats().bytes_reserved, pool.stats().blocks) == (0, 0)
    pool.allocate(1)
    assert (pool.stats().bytes_reserved, pool.stats().blocks) == (BLOCK, 1)
    pool.allocate(5 * BLOCK + 1)  # larger than a block: one of its own, since extents are contiguous
    assert pool.stats().bytes_reserved == BLOCK + 5 * BLOCK + PAGE
    assert not pool.stats().pinned


def test_freed_neighbours_merge() -> None:
    pool = HostPool(capacity=BLOCK, block_bytes=BLOCK)
    parts = [pool.allocate(4 * PAGE) for _ in range(4)]
    for i in (1, 3, 2, 0):
        pool.free(parts[i])
    assert pool.stats().largest_free == BLOCK
    assert pool.allocate(BLOCK) == min(parts)


def test_best_fit_keeps_large_extents_whole() -> None:
    pool = HostPool(capacity=BLOCK, block_bytes=BLOCK)
    parts = [pool.allocate(n * PAGE) for n in (6, 1, 2, 7)]
    pool.free(parts[0])
    pool.free(parts[2])
    assert pool.allocate(2 * PAGE) == parts[2]
    assert pool.stats().largest_free == 6 * PAGE


def test_reserve_grows_ahead() -> None:
    pool = HostPool(capacity=4 * BLOCK, block_bytes=BLOCK)
    pool.reserve(BLOCK)
    assert pool.stats().blocks == 1
    pool.allocate(BLOCK)
    assert pool.stats().blocks == 1


def test_errors_name_the_numbers() -> None:
    pool = HostPool(capacity=2 * BLOCK, block_bytes=BLOCK)
    with pytest.raises(CapacityError, match=f"{2 * BLOCK + 1} bytes can never fit .* capacity of {2 * BLOCK}"):
        pool.allocate(2 * BLOCK + 1)
    kept = pool.allocate(BLOCK + 1)
    with pytest.raises(CapacityError, match=f"{BLOCK} bytes does not fit: {BLOCK + PAGE} bytes are in use"):
        pool.allocate(BLOCK)
    for nbytes in (0, -1):
        with pytest.raises(KernelError, match="at least one byte"):
            pool.allocate(nbytes)
    with pytest.raises(KernelError, match="no live allocation starts there"):
        pool.free(kept + PAGE)
    with pytest.raises(KernelError, match="does not fit the allocation"):
        pool.view(kept, BLOCK + PAGE + 1)
    pool.free(kept)
    with pytest.raises(KernelError, match="no live allocation starts there"):
        pool.free(kept)
    with pytest.raises(KernelError, match="capacity must be at least"):
        HostPool(capacity=100)


def test_a_view_keeps_the_pool_alive() -> None:
    pool = HostPool(capacity=BLOCK, block_bytes=BLOCK)
    view = pool.view(pool.allocate(PAGE), PAGE)
    view[:] = 7
    del pool
    assert (view == 7).all()


def test_threads_share_a_pool() -> None:
    pool = HostPool(capacity=64 * BLOCK, block_bytes=BLOCK)
    faults: list[str] = []

    def work(fill: int) -> None:
        rng = np.random.default_rng(fill)
        mine: list[tuple[int, int]] = []
        for _ in range(200):
            nbytes = int(rng.integers(1, 2 * BLOCK))
            address = pool.allocate(nbytes)
            pool.view(address, nbytes)[:] = fill
            mine.append((address, nbytes))
            if len(mine) > 4:
                address, nbytes = mine.pop(int(rng.integers(len(mine))))
                if not (pool.view(address, nbytes) == fill).all():
                    faults.append(f"thread {fill} found another's bytes at {address}")
                pool.free(address)
        for address, _ in mine:
            pool.free(address)

    threads = [threading.Thread(target=work, args=(fill,)) for fill in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    assert (pool.stats().bytes_in_use, pool.stats().allocations) == (0, 0)


GIB = 1 << 30


def fake_system(root: Path, cgroup: str, available_kib: int, limits: dict[str, str]) -> str:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {available_kib} kB\n")
    for name, text in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(root)


@pytest.mark.parametrize(
    ("cgroup", "limits", "want"),
    [
        ("0::/a/b\n", {"a/b/memory.max": f"{10 * GIB}\n"}, 10 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{20 * GIB}\n"}, 20 * GIB),
        ("0::/\n", {"memory.max": f"{5 * GIB}\n"}, 5 * GIB),
        ("0::/a\n", {"a/memory.max": "max\n"}, 40 * GIB),
        ("0::/a\n", {}, 40 * GIB),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": f"{7 * GIB}\n"}, 7 * GIB),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": f"{7 * GIB}\n"}, 7 * GIB),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}, 40 * GIB),
    ],
)
def test_default_capacity(tmp_path: Path, cgroup: str, limits: dict[str, str], want: int) -> None:
    got = default_host_capacity(fake_system(tmp_path, cgroup, 40 * GIB // 1024, limits))
    assert got % PAGE == 0
    assert abs(got - 0.8 * want) < 2 * PAGE


def test_default_capacity_here() -> None:
    assert PAGE <= default_host_capacity() < 1 << 50
    with pytest.raises(KernelError, match="give the host capacity in bytes"):
        default_host_capacity("/nowhere")
