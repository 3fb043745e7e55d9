# SPDX-License-Identifier: Apache-2.0
"""Scheduler: fetch order, what may run, link budget, cancellation, and no deadlock in the FIFO ring."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vericache._C import RingAllocator, Scheduler
from vericache.errors import KernelError

UNIT = 256
STEPS = ["submit", "arrive", "run", "iteration", "cancel"]


def fetch_all(scheduler: Scheduler) -> list[tuple[int, int]]:
    """Submit what next() offers until it stops."""
    order = []
    while (item := scheduler.next()) is not None:
        assert scheduler.next() == item, "asking must change nothing"
        scheduler.submitted(*item)
        order.append(item)
    return order


def test_layers_in_order_one_request_after_the_other() -> None:
    scheduler = Scheduler(2)
    for request in (7, 3, 5):
        scheduler.enqueue(request, [10, 10])
    assert (scheduler.verifying, scheduler.waiting) == (1, 2), "the second starts once the first is submitted"
    assert fetch_all(scheduler) == [(7, 0), (7, 1), (3, 0), (3, 1)]
    assert (scheduler.verifying, scheduler.waiting) == (2, 1), "only max_verifying at a time"
    assert scheduler.runnable() == []
    scheduler.arrived(7, 0)
    scheduler.arrived(3, 1)
    assert scheduler.runnable() == [(7, 0, 1)], "layers run contiguously from the first"
    scheduler.arrived(7, 1)
    scheduler.arrived(3, 0)
    assert scheduler.runnable() == [(7, 0, 2), (3, 0, 2)]
    assert scheduler.runnable(1) == [(7, 0, 1), (3, 0, 1)]
    assert not scheduler.ran(7, 1)
    assert scheduler.runnable() == [(7, 1, 2), (3, 0, 2)]
    assert not scheduler.done(7)
    assert scheduler.ran(7, 2)
    assert scheduler.done(7)
    assert fetch_all(scheduler) == [(5, 0), (5, 1)]


def test_priority_orders_only_those_that_wait() -> None:
    scheduler = Scheduler(4)
    scheduler.enqueue(1, [10], 0)
    for request, priority in ((2, 0), (3, 5), (4, 5), (5, 9)):
        scheduler.enqueue(request, [10], priority)
    assert [request for request, _ in fetch_all(scheduler)] == [1, 5, 3, 4]


def test_resident_layers_need_no_fetch() -> None:
    scheduler = Scheduler(2)
    scheduler.enqueue(1, [0, 0, 10, 0])
    assert scheduler.runnable() == [(1, 0, 2)]
    assert fetch_all(scheduler) == [(1, 2)]
    assert scheduler.runnable() == [(1, 0, 2)], "a resident layer behind one that is under way must wait"
    scheduler.arrived(1, 2)
    assert scheduler.runnable() == [(1, 0, 4)]
    scheduler.enqueue(2, [0, 0])
    assert scheduler.runnable() == [(1, 0, 4), (2, 0, 2)]
    assert scheduler.ran(2, 2)


def test_link_budget_carries_its_debt() -> None:
    scheduler = Scheduler(4, link_bytes_per_iteration=100)
    scheduler.enqueue(1, [60, 60, 250, 10, 10])
    per_iteration = []
    for _ in range(6):
        per_iteration.append(fetch_all(scheduler))
        scheduler.begin_iteration()
    # 120 of 100: 20 owed. 80 left, 250 goes whole: 170 owed, so the next iteration has nothing.
    assert per_iteration == [[(1, 0), (1, 1)], [(1, 2)], [], [(1, 3), (1, 4)], [], []]


def test_unused_link_budget_is_lost() -> None:
    scheduler = Scheduler(1, link_bytes_per_iteration=100)
    for _ in range(10):
        scheduler.begin_iteration()
    scheduler.enqueue(1, [100, 100])
    assert fetch_all(scheduler) == [(1, 0)]


def test_admission_reserves_the_link() -> None:
    scheduler = Scheduler(8, link_bytes_per_iteration=100, horizon=10)
    assert scheduler.reserve_verify(1, 400, not_before=0) == 3
    assert scheduler.reserve_verify(2, 400, not_before=0) == 7
    assert scheduler.reserve_verify(3, 400, not_before=0) == -1, "the horizon has no room: wait"
    assert scheduler.reserve_verify(2, 100, not_before=0) == 4, "replaces the id's earlier reservation"
    assert scheduler.reserve_verify(3, 400, not_before=0) == 8
    for _ in range(4):
        scheduler.begin_iteration()
    assert scheduler.iteration == 4
    assert scheduler.link_reserved == 500
    scheduler.enqueue(3, [400])
    scheduler.cancel(3)
    assert scheduler.link_reserved == 100
    scheduler.enqueue(2, [0])
    assert scheduler.ran(2, 1)
    assert scheduler.link_reserved == 0, "a finished verify holds nothing"
    assert Scheduler(1).reserve_verify(1, 1 << 50, not_before=3) == 3, "no link budget: always room"


def test_cancel_says_which_slots_to_give_back() -> None:
    scheduler = Scheduler(3)
    scheduler.enqueue(1, [10, 0, 10, 10])
    scheduler.enqueue(2, [10])
    for _ in range(2):
        item = scheduler.next()
        assert item is not None
        scheduler.submitted(*item)
    scheduler.arrived(1, 0)
    scheduler.ran(1, 1)
    assert scheduler.cancel(1) == [2], "layer 0 has run, 1 has no bytes, 3 was not submitted"
    assert scheduler.cancel(1) == []
    assert scheduler.next() == (2, 0), "the next verify starts"
    with pytest.raises(KernelError, match="is not verifying"):
        scheduler.arrived(1, 2)
    scheduler.enqueue(1, [10])
    assert scheduler.cancel(1) == []
    assert scheduler.done(1)


def test_misuse_is_refused() -> None:
    scheduler = Scheduler(1)
    for layers in ([], [10, -1]):
        with pytest.raises(KernelError):
            scheduler.enqueue(1, layers)
    scheduler.enqueue(1, [10, 10])
    with pytest.raises(KernelError, match="queued already"):
        scheduler.enqueue(1, [10])
    with pytest.raises(KernelError, match="out of order"):
        scheduler.submitted(1, 1)
    with pytest.raises(KernelError, match="without having been submitted"):
        scheduler.arrived(1, 0)
    scheduler.submitted(1, 0)
    with pytest.raises(KernelError, match="cannot have run"):
        scheduler.ran(1, 1)
    scheduler.arrived(1, 0)
    with pytest.raises(KernelError, match="arrived twice"):
        scheduler.arrived(1, 0)
    scheduler.ran(1, 1)
    with pytest.raises(KernelError, match="cannot have run"):
        scheduler.ran(1, 1)
    for call in (lambda: Scheduler(0), lambda: Scheduler(1, -1), lambda: scheduler.runnable(-1)):
        with pytest.raises(KernelError):
            call()


@dataclass
class Simulation:
    """An engine around the scheduler: a staging ring, copies that arrive later, random steps."""

    scheduler: Scheduler
    ring: RingAllocator
    sizes: dict[int, list[int]] = field(default_factory=dict)
    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    under_way: list[tuple[int, int]] = field(default_factory=list)
    ran: dict[int, list[int]] = field(default_factory=dict)
    order: list[tuple[int, int]] = field(default_factory=list)

    def submit(self) -> bool:
        item = self.scheduler.next()
        if item is None:
            return False
        slot = self.ring.acquire(self.sizes[item[0]][item[1]])
        if slot < 0:
            return False
        self.scheduler.submitted(*item)
        self.slots[item] = slot
        self.under_way.append(item)
        self.order.append(item)
        return True

    def arrive(self) -> bool:
        if not self.under_way:
            return False
        self.scheduler.arrived(*self.under_way.pop(0))
        return True

    def run(self, most: int) -> bool:
        ranges = self.scheduler.runnable(most)
        for request, lo, hi in ranges:
            for layer in range(lo, hi):
                if self.sizes[request][layer]:
                    assert (request, layer) not in self.under_way, "a layer runs before it has arrived"
                    self.ring.release(self.slots.pop((request, layer)))
            self.ran[request] += range(lo, hi)
            assert self.scheduler.ran(request, hi) == (hi == len(self.sizes[request]))
        return bool(ranges)

    def cancel(self, request: int) -> None:
        layers = self.scheduler.cancel(request)
        held = sorted(layer for r, layer in self.slots if r == request)
        assert layers == held, "cancel must name exactly the slots that are held"
        for layer in layers:
            self.ring.release(self.slots.pop((request, layer)))
        self.under_way = [item for item in self.under_way if item[0] != request]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_everything_finishes_in_any_ring_that_fits_a_layer(data: st.DataObject) -> None:
    """Random requests, steps, cancellations: no deadlock, layers run once and in order, nothing leaks."""
    units = data.draw(st.integers(1, 8))
    layers = st.lists(st.integers(0, units).map(lambda n: n * UNIT), min_size=1, max_size=6)
    link = data.draw(st.sampled_from([0, UNIT, 3 * UNIT]))
    scheduler = Scheduler(data.draw(st.integers(1, 4)), link)
    sim = Simulation(scheduler, RingAllocator(units * UNIT))
    cancelled: set[int] = set()
    for number in range(data.draw(st.integers(1, 8))):
        sim.sizes[number] = data.draw(layers)
        sim.ran[number] = []
        scheduler.enqueue(number, sim.sizes[number], data.draw(st.integers(0, 2)))
        for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=8)):
            if step == "submit":
                sim.submit()
            elif step == "arrive":
                sim.arrive()
            elif step == "run":
                sim.run(data.draw(st.integers(0, 3)))
            elif step == "iteration":
                scheduler.begin_iteration()
            else:
                victim = data.draw(st.integers(0, number))
                if not scheduler.done(victim):
                    sim.cancel(victim)
                    cancelled.add(victim)
    for _ in range(1000):
        scheduler.begin_iteration()
        progress = sim.submit()
        progress |= sim.arrive()
        progress |= sim.run(1)
        if not (scheduler.verifying or scheduler.waiting):
            break
        assert progress or link, "nothing can move: deadlock"
    assert (scheduler.verifying, scheduler.waiting) == (0, 0), "deadlock"
    assert (sim.ring.live_slots, sim.ring.occupied) == (0, 0), "a slot leaked"
    for number, sizes in sim.sizes.items():
        want = list(range(len(sizes)))
        assert sim.ran[number] == (want[: len(sim.ran[number])] if number in cancelled else want)
        mine = [layer for request, layer in sim.order if request == number]
        assert mine == sorted(mine)
    # No layer of another request between a request's first and last, unless it was cancelled in between.
    starts = [request for i, (request, _) in enumerate(sim.order) if i == 0 or sim.order[i - 1][0] != request]
    assert len(starts) == len(set(starts))


def test_interleaving_requests_would_deadlock() -> None:
    """Negative control: layers of two requests in turn, which the scheduler never does, jam a small ring."""
    ring = RingAllocator(3 * UNIT)
    # A0 B0 A1 fill the ring. A runs both layers; its slots cannot come back past B0, and B1 has no place.
    a0, b0, a1 = (ring.acquire(UNIT) for _ in range(3))
    assert ring.release(a0) == [a0]
    assert ring.acquire(UNIT) >= 0  # A2 takes the only place
    assert ring.release(a1) == [], "a later slot's space waits for B0"
    assert ring.acquire(UNIT) < 0, "B1 has no place, B cannot finish, B0 stays"
    assert b0 == 1
