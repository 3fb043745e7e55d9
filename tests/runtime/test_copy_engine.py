# SPDX-License-Identifier: Apache-2.0
"""CopyEngine on the CPU: bytes, order, tickets, counters, failures, and callers in several threads."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.memory import Buffer, table, whole
from vericache._C import CopyEngine, CopyEngineOptions
from vericache.errors import KernelError

DIRECTIONS = ["h2d", "d2h", "d2d"]


def slow(milliseconds: int) -> CopyEngineOptions:
    return CopyEngineOptions(delay_us_min=1000 * milliseconds, delay_us_max=1000 * milliseconds)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("nbytes", [1, 61, 4096, 4097, 1 << 20])
def test_moves_every_byte_and_no_other(direction: str, nbytes: int) -> None:
    source, target = Buffer(nbytes + 64, seed=nbytes), Buffer(nbytes + 64)
    engine = CopyEngine()
    engine.wait(engine.submit(table((source.address + 7, target.address + 3, nbytes)), direction))
    assert (target.bytes[3 : 3 + nbytes] == source.bytes[7 : 7 + nbytes]).all()
    target.bytes[3 : 3 + nbytes] = 0xA5
    assert target.poisoned(), "bytes outside the row were written"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    jobs=st.lists(
        st.tuples(st.sampled_from(DIRECTIONS), st.lists(st.integers(0, 300), max_size=6)),
        min_size=1,
        max_size=30,
    ),
)
def test_random_jobs_under_random_delays(seed: int, jobs: list[tuple[str, list[int]]]) -> None:
    """Every job's bytes arrive exactly, a direction completes in order, the counters are true to the byte."""
    engine = CopyEngine(-1, CopyEngineOptions(delay_us_max=200, seed=seed))
    submitted = []
    for number, (direction, sizes) in enumerate(jobs):
        pairs = [(Buffer(n, seed=number), Buffer(n)) for n in sizes]
        ticket = engine.submit(table(*[(s.address, t.address, len(s.bytes)) for s, t in pairs]), direction)
        submitted.append((direction, ticket, pairs))
    assert len({ticket for _, ticket, _ in submitted}) == len(jobs)
    waiting = list(submitted)
    while waiting:
        seen = engine.completed()
        before = dict.fromkeys(DIRECTIONS, True)
        still = []
        # Looked at in reverse: a later ticket that is ready implies the earlier ones of its direction.
        for direction, ticket, pairs in reversed(waiting):
            if engine.ready(ticket):
                before[direction] = False
                for source, target in pairs:
                    assert (target.bytes == source.bytes).all()
            else:
                assert before[direction], "a later job of the direction was ready before an earlier one"
                still.append((direction, ticket, pairs))
        waiting = still[::-1]
        if waiting:
            assert engine.wait_any(seen) > seen
    assert engine.completed() == len(jobs)
    for direction in DIRECTIONS:
        mine = [sizes for d, sizes in jobs if d == direction]
        counters = engine.counters(direction)
        assert counters.bytes == sum(map(sum, mine))
        assert counters.rows == sum(n > 0 for sizes in mine for n in sizes)
        assert counters.copies <= counters.rows
        assert (counters.jobs, counters.failed) == (len(mine), 0)
        assert (counters.in_flight_jobs, counters.in_flight_bytes) == (0, 0)


def test_jobs_of_a_direction_run_in_order() -> None:
    """Ten jobs write the same byte: the last one submitted must win, whatever the delays."""
    sources = [Buffer(1) for _ in range(10)]
    for value, source in enumerate(sources):
        source.bytes[:] = value
    for seed in range(5):
        target = Buffer(1)
        engine = CopyEngine(-1, CopyEngineOptions(delay_us_max=500, seed=seed))
        tickets = [engine.submit(whole(source, target), "h2d") for source in sources]
        engine.wait(tickets[4])
        assert target.bytes[0] >= 4
        engine.wait(tickets[-1])
        assert target.bytes[0] == 9


def test_reading_before_ready_finds_poison() -> None:
    """Negative control: with a delay injected, a reader that does not wait reads what was there before."""
    source, target = Buffer(1000, seed=3), Buffer(1000)
    engine = CopyEngine(-1, slow(100))
    ticket = engine.submit(whole(source, target), "h2d")
    assert not engine.ready(ticket)
    assert target.poisoned()
    assert engine.counters("h2d").bytes == 0
    assert engine.counters("h2d").in_flight_bytes == 1000
    engine.wait(ticket)
    assert engine.ready(ticket)
    assert (target.bytes == source.bytes).all()
    assert engine.counters("h2d").bytes == 1000


def test_adjacent_rows_are_joined() -> None:
    source, target = Buffer(1000, seed=3), Buffer(1000)
    s, t = source.address, target.address
    engine = CopyEngine()
    # 0-300 in three pieces and an empty one; then a gap in the source; then a gap in the target.
    joined = [(s, t, 100), (s + 100, t + 100, 150), (0, 0, 0), (s + 250, t + 250, 50)]
    rows = table(*joined, (s + 400, t + 300, 10), (s + 410, t + 500, 10))
    engine.wait(engine.submit(rows, "h2d"))
    counters = engine.counters("h2d")
    assert (counters.rows, counters.copies, counters.bytes) == (5, 3, 320)
    want = np.full(1000, 0xA5, dtype=np.uint8)
    want[:300] = source.bytes[:300]
    want[300:310] = source.bytes[400:410]
    want[500:510] = source.bytes[410:420]
    assert (target.bytes == want).all()


def test_an_empty_table_completes_in_its_turn() -> None:
    engine = CopyEngine(-1, slow(100))
    source, target = Buffer(10, seed=1), Buffer(10)
    engine.submit(whole(source, target), "h2d")
    empty = engine.submit(table(), "h2d")
    assert not engine.ready(empty)
    engine.wait(empty)
    assert (target.bytes == source.bytes).all()


@pytest.mark.parametrize("fail_after", [0, 1, 2])
def test_a_failed_copy_keeps_its_error_and_the_engine_goes_on(fail_after: int) -> None:
    pairs = [(Buffer(500, seed=i), Buffer(500)) for i in range(3)]
    engine = CopyEngine(-1, CopyEngineOptions(fail_after=fail_after))
    tickets = [engine.submit(whole(s, t), "h2d") for s, t in pairs]
    engine.wait_until(3)
    for i, (ticket, (source, target)) in enumerate(zip(tickets, pairs, strict=True)):
        if i == fail_after:
            for ask in (engine.ready, engine.wait, engine.ready, lambda t: engine.wait_on_stream(t, 0)):
                with pytest.raises(KernelError, match=f"h2d copy failed .ticket {ticket}.: failure injected"):
                    ask(ticket)
            assert target.poisoned(), "a failed copy moved bytes"
        else:
            assert engine.ready(ticket)
            assert (target.bytes == source.bytes).all()
    counters = engine.counters("h2d")
    assert (counters.jobs, counters.failed, counters.bytes) == (2, 1, 1000)


def test_after_orders_two_directions() -> None:
    """A page on its way to the host is fetched back: the fetch must see what the store wrote."""
    device, host, back = Buffer(4096, seed=1), Buffer(4096), Buffer(4096)
    engine = CopyEngine(-1, slow(30))
    store = engine.submit(whole(device, host), "d2h")
    engine.wait(engine.submit(whole(host, back), "h2d", after=store))
    assert (back.bytes == device.bytes).all()


def test_without_after_two_directions_race() -> None:
    """Negative control of the test above: the fetch overtakes the store."""
    device, host, back = Buffer(4096, seed=1), Buffer(4096), Buffer(4096)
    engine = CopyEngine(-1, CopyEngineOptions(bandwidth_bytes_per_s=1e6))
    keeps_busy = Buffer(400_000, seed=2), Buffer(400_000)
    engine.submit(whole(*keeps_busy), "d2h")
    engine.submit(whole(device, host), "d2h")
    engine.wait(engine.submit(whole(host, back), "h2d"))
    assert back.poisoned()


def test_a_copy_fails_with_the_one_it_follows() -> None:
    a, b, c = Buffer(100, seed=1), Buffer(100), Buffer(100)
    for settled in (False, True):
        engine = CopyEngine(-1, CopyEngineOptions(fail_after=0))
        first = engine.submit(whole(a, b), "d2h")
        if settled:
            engine.wait_until(1)
        second = engine.submit(whole(b, c), "h2d", after=first)
        with pytest.raises(KernelError, match="the copy it follows failed: failure injected"):
            engine.wait(second)
        assert c.poisoned()


def test_directions_run_at_the_same_time() -> None:
    engine = CopyEngine(-1, CopyEngineOptions(bandwidth_bytes_per_s=1e6))
    long = engine.submit(whole(Buffer(400_000, seed=1), large := Buffer(400_000)), "h2d")
    for direction in ("d2h", "d2d"):
        source, target = Buffer(100, seed=1), Buffer(100)
        engine.wait(engine.submit(whole(source, target), direction))
        assert (target.bytes == source.bytes).all()
        assert not engine.ready(long), "a copy of another direction waited for this one"
    engine.wait(long)
    assert not large.poisoned()


def test_waiting_releases_the_gil() -> None:
    engine = CopyEngine(-1, slow(200))
    source, target = Buffer(10, seed=1), Buffer(10)
    ticket = engine.submit(whole(source, target), "h2d")
    thread = threading.Thread(target=engine.wait, args=(ticket,))
    thread.start()
    time.sleep(0.02)  # lets the thread in
    assert not engine.ready(ticket), "nothing ran beside the waiting thread"
    thread.join()
    assert engine.ready(ticket)


def test_wait_until() -> None:
    engine = CopyEngine(-1, slow(100))
    pairs = [(Buffer(10, seed=i), Buffer(10)) for i in range(3)]
    assert engine.wait_until(5) == 0, "nothing in flight can reach the count: return, not hang"
    for source, target in pairs:
        engine.submit(whole(source, target), "h2d")
    assert engine.wait_until(3, 0.001) == 0
    assert engine.wait_until(2) == 2
    assert engine.wait_any(2) == 3
    assert engine.wait_until(9) == 3


def test_submitting_from_two_threads() -> None:
    """Both directions from both threads: every byte arrives, no ticket is given twice."""
    engine = CopyEngine(-1, CopyEngineOptions(delay_us_max=50))
    results: list[list[tuple[int, Buffer, Buffer]]] = [[], []]

    def work(which: int) -> None:
        rng = np.random.default_rng(which)
        for i in range(150):
            nbytes = int(rng.integers(1, 5000))
            source, target = Buffer(nbytes, seed=1000 * which + i), Buffer(nbytes)
            ticket = engine.submit(whole(source, target), DIRECTIONS[i % 2])
            results[which].append((ticket, source, target))
            if i % 7 == 0:
                engine.wait(ticket)
                assert (target.bytes == source.bytes).all()

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = results[0] + results[1]
    assert len(everything) == len({ticket for ticket, _, _ in everything}) == 300
    for ticket, source, target in everything:
        engine.wait(ticket)
        assert (target.bytes == source.bytes).all()
    total = sum(engine.counters(d).bytes for d in DIRECTIONS)
    assert total == sum(len(source.bytes) for _, source, _ in everything)


def test_the_emulated_link_has_its_rate() -> None:
    rate, nbytes = 50e6, 500_000
    engine = CopyEngine(-1, CopyEngineOptions(bandwidth_bytes_per_s=rate))
    pairs = [(Buffer(nbytes, seed=i), Buffer(nbytes)) for i in range(10)]
    start = time.perf_counter()
    for source, target in pairs:
        engine.submit(whole(source, target), "h2d")
    engine.wait_until(10)
    took = time.perf_counter() - start
    assert took >= 10 * nbytes / rate * 0.999
    assert 10 * nbytes / rate * 0.99 <= engine.counters("h2d").busy_seconds <= took


@pytest.mark.parametrize("drain", [True, False])
def test_shutdown(drain: bool) -> None:
    engine = CopyEngine(-1, slow(60))
    pairs = [(Buffer(100, seed=i), Buffer(100)) for i in range(4)]
    tickets = [engine.submit(whole(s, t), "h2d") for s, t in pairs]
    engine.wait(tickets[0])
    engine.shutdown(drain)
    engine.shutdown(drain)
    kept = [t.bytes.copy() for _, t in pairs]
    if drain:
        assert all(engine.ready(t) for t in tickets)
    else:
        with pytest.raises(KernelError, match="shut down before it ran"):
            engine.ready(tickets[3])
        assert pairs[3][1].poisoned()
    assert engine.completed() == 4
    with pytest.raises(KernelError, match="takes no further copies"):
        engine.submit(table(), "h2d")
    time.sleep(0.05)
    now = [t.bytes for _, t in pairs]
    assert all((a == b).all() for a, b in zip(now, kept, strict=True)), "a byte moved after shutdown"


def test_destruction_joins() -> None:
    source, target = Buffer(100, seed=1), Buffer(100)
    engine = CopyEngine(-1, slow(30))
    for _ in range(3):
        engine.submit(whole(source, target), "h2d")
    del engine
    target.bytes[:] = 0xA5
    time.sleep(0.08)
    assert target.poisoned(), "the engine wrote after it was gone"


def test_bad_arguments_submit_nothing() -> None:
    engine = CopyEngine()
    good = Buffer(8, seed=1)
    cases: list[tuple[Any, str, str]] = [
        (np.zeros((1, 3), np.int32), "h2d", "must be int64, not int32"),
        (np.zeros((1, 4), np.int64), "h2d", r"shape \[n, 3\]"),
        (np.zeros(3, np.int64), "h2d", r"shape \[n, 3\]"),
        (np.zeros((3, 4), np.int64).T[:, :3], "h2d", "C-contiguous"),
        (table((good.address, good.address, -1)), "h2d", "row 0 has -1 bytes"),
        (table((1, 1, 0), (0, good.address, 4)), "h2d", "row 1 of 4 bytes has a null address"),
        (table(), "up", "unknown copy direction 'up'; use h2d, d2h or d2d"),
    ]
    for rows, direction, message in cases:
        with pytest.raises(KernelError, match=message):
            engine.submit(rows, direction)
    for ticket in (-1, 0, 5):
        with pytest.raises(KernelError, match="was never given out"):
            engine.ready(ticket)
    with pytest.raises(KernelError, match="was never given out"):
        engine.submit(table(), "h2d", after=12)
    with pytest.raises(KernelError, match="unknown copy direction"):
        engine.counters("sideways")
    assert engine.completed() == 0
    assert engine.counters("h2d").in_flight_jobs == 0
    with pytest.raises(KernelError, match="is not a range"):
        CopyEngine(-1, CopyEngineOptions(delay_us_min=5, delay_us_max=1))
    with pytest.raises(KernelError, match="is negative"):
        CopyEngine(-1, CopyEngineOptions(bandwidth_bytes_per_s=-1.0))
