# SPDX-License-Identifier: Apache-2.0
"""The staging ring: placement against a byte-by-byte model, events, contents under concurrent copies."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.memory import Buffer, table
from vericache._C import CopyEngine, CopyEngineOptions, RingAllocator, StagingRing
from vericache.errors import CapacityError, KernelError

A = 256


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.integers(1, 12 * A), st.integers(0, 99)), max_size=120),
)
def test_placement_against_model(units: int, steps: list[tuple[bool, int, int]]) -> None:
    """Slots never overlap, stay inside, follow ring order; a refusal means the ring's next place is taken."""
    ring = RingAllocator(units * A + 255)
    assert ring.capacity == units * A
    owner: list[int | None] = [None] * units
    order: deque[int] = deque()  # acquired, space not reclaimed
    released: set[int] = set()
    for acquire, nbytes, pick in steps:
        need = -(-nbytes // A)
        if acquire and need > units:
            with pytest.raises(CapacityError, match="can never fit the ring"):
                ring.acquire(nbytes)
        elif acquire:
            fits = ring.fits(nbytes)
            slot = ring.acquire(nbytes)
            assert fits == (slot >= 0)
            if slot < 0:
                assert order, "an empty ring refused a slot that fits it"
                assert not model_fits(owner, order, need), "refused although the ring's next place is free"
                continue
            first = ring.offset(slot) // A
            assert ring.offset(slot) % A == 0
            assert ring.bytes(slot) == need * A
            assert all(o is None for o in owner[first : first + need]), "slots overlap"
            assert first + need <= units
            owner[first : first + need] = [slot] * need
            order.append(slot)
        else:
            live = [s for s in order if s not in released]
            if not live:
                continue
            slot = live[pick % len(live)]
            released.add(slot)
            expected = []
            while order and order[0] in released:
                expected.append(order.popleft())
            assert ring.release(slot) == expected, "space must come back in the order it was handed out"
            owner = [None if o in expected else o for o in owner]
            with pytest.raises(KernelError, match="is not live"):
                ring.release(slot)
        assert ring.live_slots == len([s for s in order if s not in released])
        assert ring.occupied >= sum(o is not None for o in owner) * A
    for slot in list(order):
        if slot not in released:
            ring.release(slot)
    assert (ring.live_slots, ring.occupied) == (0, 0)
    assert ring.acquire(units * A) >= 0, "an empty ring must take a slot of its whole size"


def model_fits(owner: list[int | None], order: deque[int], need: int) -> bool:
    """Whether `need` units are free behind the newest slot, or at the start when the ring may wrap."""
    head = max(i for i, o in enumerate(owner) if o == order[-1]) + 1
    tail = min(i for i, o in enumerate(owner) if o == order[0])
    if head > tail:
        return need <= len(owner) - head or need <= tail
    return need <= tail - head


def test_bad_arguments() -> None:
    for nbytes in (0, -5):
        with pytest.raises(KernelError, match="at least one byte"):
            RingAllocator(A).acquire(nbytes)
    with pytest.raises(KernelError, match="at least 256 bytes"):
        RingAllocator(255)
    with pytest.raises(KernelError, match="is not live"):
        RingAllocator(A).release(0)
    with pytest.raises(KernelError, match="not a multiple of 256"):
        StagingRing(257, 10 * A)
    ring = StagingRing(A, 10 * A)
    for call in (ring.address, ring.bytes, ring.ready, ring.release):
        with pytest.raises(KernelError, match="slot 3 is not live"):
            call(3)


def test_ready_is_false_until_the_copy_arrives() -> None:
    source, target = Buffer(A, seed=1), Buffer(A)
    ring = StagingRing(target.address, A)
    engine = CopyEngine(-1, CopyEngineOptions(delay_us_min=100_000, delay_us_max=100_000))
    slot = ring.acquire(A)
    assert not ring.ready(slot)
    with pytest.raises(KernelError, match="no copy into staging slot 0 was submitted"):
        ring.wait_on_stream(slot, 0)
    engine.submit(table((source.address, ring.address(slot), A)), "h2d", ring=ring, slot=slot)
    assert not ring.ready(slot)
    assert target.poisoned(), "negative control: bytes were there before the copy was ready"
    ring.wait_on_stream(slot, 0)
    assert ring.ready(slot)
    assert (target.bytes == source.bytes).all()


def test_a_failed_copy_fails_its_slot_and_can_be_repeated() -> None:
    source, target = Buffer(A, seed=1), Buffer(A)
    ring = StagingRing(target.address, A)
    engine = CopyEngine(-1, CopyEngineOptions(fail_after=0))
    slot = ring.acquire(A)
    rows = table((source.address, ring.address(slot), A))
    engine.submit(rows, "h2d", ring=ring, slot=slot)
    engine.wait_until(1)
    for _ in range(2):
        with pytest.raises(KernelError, match="copy into staging slot 0 failed: failure injected"):
            ring.ready(slot)
    assert target.poisoned()
    engine.wait(engine.submit(rows, "h2d", ring=ring, slot=slot))
    assert ring.ready(slot)
    assert (target.bytes == source.bytes).all()


def test_a_copy_must_stay_in_its_slot() -> None:
    source, target = Buffer(4 * A, seed=1), Buffer(4 * A)
    ring = StagingRing(target.address, 4 * A)
    engine = CopyEngine()
    slot = ring.acquire(A)
    for dst, nbytes in ((ring.address(slot) + 1, A), (ring.address(slot) - 1, 5), (source.address, 8)):
        with pytest.raises(KernelError, match="leaves staging slot 0"):
            engine.submit(table((source.address, dst, nbytes)), "h2d", ring=ring, slot=slot)
    with pytest.raises(KernelError, match="slot 7 is not live"):
        engine.submit(table((source.address, ring.address(slot), 1)), "h2d", ring=ring, slot=7)
    assert engine.completed() == 0
    assert target.poisoned()


def test_space_of_a_cancelled_copy_is_written_only_after_it() -> None:
    """Released under way, its place taken over by a copy of another direction: the later bytes must win."""
    late, early, target = Buffer(A, seed=1), Buffer(A, seed=2), Buffer(A)
    ring = StagingRing(target.address, A)
    # The delay makes the first copy slow; the second has as long a delay, but must not begin beside it.
    engine = CopyEngine(-1, CopyEngineOptions(delay_us_min=20_000, delay_us_max=20_000))
    first = ring.acquire(A)
    engine.submit(table((early.address, target.address, A)), "d2d", ring=ring, slot=first)
    ring.release(first)
    second = ring.acquire(A)
    ticket = engine.submit(table((late.address, target.address, A)), "h2d", ring=ring, slot=second)
    engine.wait(ticket)
    assert engine.counters("d2d").jobs == 1, "the cancelled copy was overtaken"
    assert (target.bytes == late.bytes).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 7 * A), min_size=1, max_size=40), st.randoms())
def test_contents_survive_a_busy_ring(seed: int, sizes: list[int], random) -> None:  # type: ignore[no-untyped-def]
    """Random delays, random release order, many laps: a slot holds its own bytes from ready to release."""
    source, target = Buffer(7 * A, seed=seed), Buffer(9 * A)
    ring = StagingRing(target.address, 9 * A)
    engine = CopyEngine(-1, CopyEngineOptions(delay_us_max=300, seed=seed))
    live: list[tuple[int, int, int]] = []  # slot, first byte in source, bytes

    def retire() -> None:
        slot, begin, nbytes = live.pop(random.randrange(len(live)))
        ring.wait_on_stream(slot, 0)
        at = ring.address(slot) - target.address
        assert (target.bytes[at : at + nbytes] == source.bytes[begin : begin + nbytes]).all()
        ring.release(slot)

    for nbytes in sizes:
        while (slot := ring.acquire(nbytes)) < 0:
            retire()
        begin = random.randrange(7 * A - nbytes + 1)
        rows = table((source.address + begin, ring.address(slot), nbytes))
        engine.submit(rows, "h2d", ring=ring, slot=slot)
        live.append((slot, begin, nbytes))
    while live:
        retire()
    stats = ring.stats()
    assert (stats.occupied, stats.live_slots, stats.acquired) == (0, 0, len(sizes))
    assert stats.peak_occupied <= stats.capacity == 9 * A
    assert engine.counters("h2d").bytes == sum(sizes)
