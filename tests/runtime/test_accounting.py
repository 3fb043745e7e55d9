# SPDX-License-Identifier: Apache-2.0
"""ReservationRing and MemoryLedger against models in Python."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vericache._C import MemoryLedger, ReservationRing, format_bytes
from vericache.errors import KernelError

MIB = 1 << 20

owners, starts = st.integers(0, 4), st.integers(0, 25)
ring_steps = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), owners, st.integers(0, 40), st.integers(0, 12), starts),
        st.tuples(st.just("span"), owners, st.integers(0, 12), st.integers(1, 6), starts),
        st.tuples(st.sampled_from(["release", "advance"]), owners, st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10), st.integers(1, 9), ring_steps)
def test_reservations_against_model(capacity: int, horizon: int, steps) -> None:  # type: ignore[no-untyped-def]
    ring = ReservationRing(capacity, horizon)
    used: dict[int, int] = defaultdict(int)  # iteration -> units
    held: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))  # owner -> iteration -> units
    now = 0

    def free(i: int) -> int:
        return capacity - used[i] if now <= i < now + horizon else 0

    for what, owner, amount, per, start in steps:
        first = max(now, start)
        if what == "reserve":
            left, want, parts = amount, -1, {}
            for i in range(first, now + horizon):
                parts[i] = min(free(i), left, per or capacity)
                left -= parts[i]
                if left <= 0:
                    want = i
                    break
            assert ring.earliest_fit(amount, per, start) == want
            assert ring.reserve(owner, amount, per, start) == want
            if want >= 0:
                for i, part in parts.items():
                    used[i] += part
                    held[owner][i] += part
        elif what == "span":
            starts = [i for i in range(first, now + horizon - per + 1)
                      if all(free(j) >= amount for j in range(i, i + per))]  # fmt: skip
            want = starts[0] if starts else -1
            assert ring.earliest_span(amount, per, start) == want
            taken = ring.reserve_span(owner, amount, start, per)
            assert taken == (start >= now and want == start)
            if taken:
                for i in range(start, start + per):
                    used[i] += amount
                    held[owner][i] += amount
        elif what == "release":
            mine = {i: n for i, n in held.pop(owner, {}).items() if i >= now}
            assert ring.release(owner) == sum(mine.values())
            for i, n in mine.items():
                used[i] -= n
        else:
            ring.advance(owner)
            now += owner
        assert ring.now == now
        for i in range(now - 2, now + horizon + 2):
            assert ring.free_at(i) == free(i)
            assert 0 <= ring.free_at(i) <= capacity
        assert ring.reserved == sum(n for i, n in used.items() if i >= now)


def test_verifies_are_staggered() -> None:
    """Three fetches of two iterations' worth each on one link end two iterations apart."""
    ring = ReservationRing(capacity=100, horizon=8)
    assert [ring.reserve(owner, 200, not_before=1) for owner in (1, 2, 3)] == [2, 4, 6]
    assert ring.reserve(4, 200, not_before=1) == -1, "beyond the horizon: not admitted"
    assert ring.reserved == 600
    ring.release(2)
    assert ring.reserve(4, 200, not_before=1) == 4


def test_ring_arguments() -> None:
    for capacity, horizon in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(KernelError):
            ReservationRing(capacity, horizon)
    ring = ReservationRing(4, 4)
    for call in (lambda: ring.earliest_fit(-1), lambda: ring.earliest_fit(1, -1), lambda: ring.advance(-1),
                 lambda: ring.earliest_span(1, 0), lambda: ring.reserve(0, -3)):  # fmt: skip
        with pytest.raises(KernelError):
            call()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 100),
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "resize", "release"]),
            st.integers(-2, 3),
            st.sampled_from(["weights", "tail", "draft"]),
            st.integers(0, 60),
        ),
        max_size=50,
    ),
)
def test_ledger_against_model(budget: int, steps: list[tuple[str, int, str, int]]) -> None:
    ledger = MemoryLedger(budget)
    held: dict[tuple[int, str], int] = defaultdict(int)
    peak = 0
    for what, owner, kind, nbytes in steps:
        used = sum(held.values())
        if what == "reserve":
            fits = used + nbytes <= budget
            assert ledger.try_reserve(owner, kind, nbytes) == fits
            held[owner, kind] += nbytes if fits else 0
        elif what == "resize":
            grown = nbytes - held[owner, kind]
            fits = grown <= 0 or used + grown <= budget
            assert ledger.try_resize(owner, kind, nbytes) == fits
            held[owner, kind] += grown if fits else 0
        else:
            assert ledger.release(owner) == sum(n for (o, _), n in held.items() if o == owner)
            held = defaultdict(int, {k: n for k, n in held.items() if k[0] != owner})
        used = sum(held.values())
        peak = max(peak, used)
        assert (ledger.used(), ledger.free(), ledger.peak()) == (used, budget - used, peak)
        kinds: dict[str, int] = defaultdict(int)
        for (_, k), n in held.items():
            kinds[k] += n
        assert ledger.used_by_kind() == {k: n for k, n in kinds.items() if n}
        permanent = sum(n for (o, _), n in held.items() if o < 0)
        for ask in (0, 1, budget - permanent, budget - permanent + 1):
            assert ledger.would_ever_fit(ask) == (permanent + ask <= budget)
        assert ledger.held(owner) == sum(n for (o, _), n in held.items() if o == owner)


def test_the_arithmetic_as_a_sentence() -> None:
    ledger = MemoryLedger(64 * MIB)
    assert ledger.budget == 64 * MIB
    assert ledger.describe() == "nothing = 0 B of 64.0 MiB"
    assert ledger.try_reserve(MemoryLedger.PERMANENT, "weights", 23 * MIB)
    assert ledger.try_reserve(MemoryLedger.PERMANENT, "staging", 8 * MIB)
    assert ledger.try_reserve(5, "tail", 512)
    assert ledger.describe() == "weights 23.0 MiB + staging 8.0 MiB + tail 512 B = 31.0 MiB of 64.0 MiB"
    assert ledger.describe("request", 34 * MIB, True) == (
        "weights 23.0 MiB + staging 8.0 MiB + request 34.0 MiB = 65.0 MiB of 64.0 MiB, 1.0 MiB too many"
    )
    assert not ledger.would_ever_fit(34 * MIB)
    assert ledger.would_ever_fit(33 * MIB)
    with pytest.raises(KernelError, match="cannot be negative"):
        ledger.try_reserve(1, "tail", -1)
    with pytest.raises(KernelError, match="must be positive"):
        MemoryLedger(0)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (MIB - 1, "1.0 MiB"), (int(23.14 * MIB), "23.1 MiB"),
     (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB"), (5000 << 40, "5000.0 TiB")],
)  # fmt: skip
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text
