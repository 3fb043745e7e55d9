# SPDX-License-Identifier: Apache-2.0
"""Acceptance: what a verified window lets through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """Outcome of one verification.

    Args:
        matched: drafted tokens equal to the verifier's, from the start of the window.
        emitted: tokens to emit: the matches, then the verifier's correction or bonus.
        draft: what remains of the draft, beyond the emitted tokens.
    """

    matched: int
    emitted: tuple[int, ...]
    draft: tuple[int, ...]


def accept(draft: Sequence[int], verified: Sequence[int]) -> Acceptance:
    """Compare the draft with the verifier's tokens.

    Args:
        draft: drafted tokens; ``draft[i]`` was drafted for the position of ``verified[i]``. May be longer than the
            window (the draft ran ahead) and is at least ``len(verified) - 1`` long.
        verified: the verifier's token for each row of the window, bonus included.

    The draft survives only where every token before it was right: the bonus token, which no row verified, must
    agree with a draft that ran ahead, or the rest is thrown away.
    """
    matched = 0
    for token, truth in zip(draft, verified, strict=False):
        if token != truth:
            return Acceptance(matched, tuple(verified[: matched + 1]), ())
        matched += 1
    inside = min(matched, len(verified) - 1)
    return Acceptance(inside, tuple(verified), tuple(draft[len(verified) :]))
