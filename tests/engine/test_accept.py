# SPDX-License-Identifier: Apache-2.0
"""Acceptance is a pure function: its cases by name, and its property by search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vericache.engine.accept import Acceptance, accept


def test_all_accepted_gives_the_bonus() -> None:
    assert accept([1, 2], [1, 2, 3]) == Acceptance(2, (1, 2, 3), ())


def test_all_rejected_gives_the_correction_alone() -> None:
    assert accept([9, 2], [1, 2, 3]) == Acceptance(0, (1,), ())


def test_first_disagreement_ends_it() -> None:
    assert accept([1, 9, 3], [1, 2, 3, 4]) == Acceptance(1, (1, 2), ())


def test_run_ahead_survives_only_if_the_bonus_agrees() -> None:
    assert accept([1, 2, 3, 4], [1, 2, 3]) == Acceptance(2, (1, 2, 3), (4,))
    assert accept([1, 2, 9, 4], [1, 2, 3]) == Acceptance(2, (1, 2, 3), ())


def test_empty_window() -> None:
    assert accept([], [7]) == Acceptance(0, (7,), ())
    assert accept([7, 8], [7]) == Acceptance(0, (7,), (8,))


tokens = st.lists(st.integers(0, 2), max_size=6)


@given(verified=st.lists(st.integers(0, 2), min_size=1, max_size=6), extra=tokens, data=st.data())
def test_emitted_is_the_verifiers_own_text(verified: list[int], extra: list[int], data: st.DataObject) -> None:
    draft = data.draw(st.lists(st.integers(0, 2), min_size=len(verified) - 1, max_size=len(verified) - 1)) + extra
    result = accept(draft, verified)
    emitted = list(result.emitted)
    assert emitted == verified[: len(emitted)] and emitted
    assert emitted[:-1] == draft[: len(emitted) - 1]
    assert result.matched <= len(verified) - 1
    # A shorter emission needs a disagreement to justify it; a surviving draft needs none before it.
    if len(emitted) < len(verified):
        assert draft[len(emitted) - 1] != emitted[-1] and not result.draft
    if result.draft:
        assert list(result.draft) == draft[len(verified) :] and emitted == draft[: len(verified)]
