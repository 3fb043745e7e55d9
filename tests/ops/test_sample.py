# SPDX-License-Identifier: Apache-2.0
"""sample: against an independent Philox and float64 filters, in distribution, and as a pure function of the row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same_bytes, first_difference
from vericache import ops
from vericache.errors import KernelError


def _philox(block: int, position: int, seed: int) -> list[int]:
    """Philox4x32-10, written from the paper's description, on Python integers."""
    mask = 0xFFFFFFFF
    c = [block, position, 0, 0]
    key = [seed & mask, (seed >> 32) & mask]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ key[0], high & mask, (low >> 32) ^ c[3] ^ key[1], low & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


def _gumbel(vocab: int, position: int, seed: int) -> np.ndarray:
    words = [word for block in range(-(-vocab // 4)) for word in _philox(block, position, seed)][:vocab]
    u = (np.array([word >> 8 for word in words], dtype=np.float64) + 0.5) * 2.0**-24
    return (-np.log(-np.log(u))).astype(np.float32)


def _reference(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    values = logits.numpy()
    if temperature == 0:
        return int(values.argmax())
    scaled = values / np.float32(temperature)
    order = np.lexsort((np.arange(len(scaled)), -scaled))  # value descending, index ascending
    if top_k > 0:
        order = order[:top_k]
    weight = np.exp(scaled[order].astype(np.float64) - float(scaled.max()))
    if top_p < 1:
        count = int(np.searchsorted(weight.cumsum(), np.float64(np.float32(top_p)) * weight.sum())) + 1
        order, weight = order[:count], weight[:count]
    order = order[weight >= np.float64(np.float32(min_p))]
    kept = np.sort(order)
    noisy = scaled[kept] + _gumbel(len(scaled), position, seed)[kept]
    return int(kept[noisy.argmax()])


def _sample(
    logits: Tensor,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int | list[int] = 0,
    position: int | list[int] = 0,
) -> tuple[Tensor, Tensor]:
    def column(value: float | int | list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value if isinstance(value, list) else [value] * logits.shape[0], dtype=dtype)

    return ops.sample(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(min_p, torch.float32),
        column(seed, torch.int64),
        column(position, torch.int32),
    )


def test_philox_known_answers() -> None:
    """The published vectors of Random123 (kat_vectors, philox4x32-10) hold for the test's generator."""
    assert _philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("vocab", [1, 2, 61, 700])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.0, 3, 0.1, 0.5),
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.9, 40, 0.9, 0.02),
        (5.0, 1, 1.0, 0.0),
        (2.0, 0, 1e-6, 0.0),
        (1.0, 0, 0.999999, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1e-3, 0, 1.0, 0.0),
    ],
)
def test_against_reference(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, rng: torch.Generator
) -> None:
    logits = torch.randn(12, vocab, generator=rng) * 3
    seeds = torch.randint(-(2**63), 2**63 - 1, (12,), generator=rng).tolist()
    positions = torch.randint(0, 2**31 - 1, (12,), generator=rng).tolist()
    token, logprob = _sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    want = [_reference(logits[i], temperature, top_k, top_p, min_p, seeds[i], positions[i]) for i in range(12)]
    assert token.tolist() == want
    exact = logits.double().log_softmax(-1)[torch.arange(12), token]
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-6, atol=2e-6)


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(1, 50)
    logits[0, [7, 30]] = 2.0
    assert _sample(logits, 0.0)[0].item() == 7
    # A filter that must cut among equals keeps the lower indices: top_k = 1 leaves token 7 whatever the noise.
    assert {_sample(logits, 1.0, top_k=1, seed=s)[0].item() for s in range(40)} == {7}
    assert {_sample(logits, 1.0, top_k=2, seed=s)[0].item() for s in range(40)} == {7, 30}
    assert {_sample(logits * 20, 1.0, top_p=0.4, seed=s)[0].item() for s in range(40)} == {7}


def test_rows_are_pure_functions(rng: torch.Generator, threads: None) -> None:
    logits = torch.randn(61, 1000, generator=rng)
    params: dict[str, list] = {
        "temperature": [0.0, 0.5, 1.0] * 20 + [1.0],
        "top_k": [0, 0, 50, 0] * 15 + [0],
        "top_p": [1.0, 0.9] * 30 + [1.0],
        "seed": list(range(61)),
        "position": list(range(100, 161)),
    }
    token, logprob = _sample(logits, **params)
    for i in range(61):
        alone = _sample(logits[i : i + 1], **{name: column[i : i + 1] for name, column in params.items()})
        assert_same_bytes(alone[0], token[i : i + 1])
        assert_same_bytes(alone[1], logprob[i : i + 1])
    ops.set_num_threads(1)
    again = _sample(logits, **params)
    assert_same_bytes(again[0], token)
    assert_same_bytes(again[1], logprob)
    # Negative controls: noise that did not hang on the seed or on the position would pass the lines above.
    for name in ("seed", "position"):
        moved = _sample(logits, **{**params, name: [value + 1 for value in params[name]]})
        assert first_difference(moved[0], token) is not None


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_distribution(vary: str) -> None:
    """20,000 draws of one row: chi-squared under its 99.9th percentile (29.6 at 10 degrees of freedom)."""
    draws = 20_000
    row = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.5, 0.1, -0.5, 0.7, 1.2, -2.0])
    temperature = 0.8
    token, _ = _sample(row.expand(draws, 11), temperature, **{vary: list(range(draws))})  # type: ignore[arg-type]
    expected = (row.double() / temperature).softmax(0) * draws
    observed = torch.bincount(token, minlength=11).double()
    assert float(((observed - expected) ** 2 / expected).sum()) < 29.6
    assert float(((observed.roll(1) - expected) ** 2 / expected).sum()) > 29.6  # the statistic can fail


def test_largest_noise_is_finite() -> None:
    """u at its largest, 1 - 2^-25, is 1 in float32: its noise would be infinite and beat any logit."""
    u = (float(2**24 - 1) + 0.5) * 2.0**-24
    assert np.float32(u) == 1.0
    assert -math.log(-math.log(u)) == pytest.approx(17.33, abs=0.01)
    vocab = 4096
    rows = 2048  # 8 million words, of which about half hold the largest 24 bits at least once
    logits = torch.full((rows, vocab), -100.0)
    logits[:, 0] = 0.0
    token, _ = _sample(logits, seed=list(range(rows)))
    assert token.tolist() == [0] * rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_softmax(temperature: float) -> None:
    logits = torch.zeros(6, 9)
    logits[1, 8] = float("nan")
    logits[2, :] = -float("inf")
    logits[3, 2] = float("inf")
    logits[4, :] = -float("inf")
    logits[4, 4] = 0.0
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        token, logprob = _sample(logits, temperature, seed=1, **filters)  # type: ignore[arg-type]
        assert token[[1, 2, 3]].tolist() == [-1, -1, -1]
        assert bool(logprob[[1, 2, 3]].isnan().all())
        assert (token[4].item(), logprob[4].item()) == (4, 0.0)
        assert token[0].item() >= 0
        assert logprob[0].item() == pytest.approx(-math.log(9))


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = torch.tensor([[1.0, 30.0, 40.0]])
    assert {_sample(logits, 1e-38, top_p=0.5, seed=s)[0].item() for s in range(20)} == {2}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_large_vocabulary(top_p: float, rng: torch.Generator) -> None:
    """Flat and peaked rows at a real vocabulary's size; the shortcuts of the search must not show."""
    logits = torch.randn(2, 32_003, generator=rng) * torch.tensor([[0.5], [6.0]])
    for kwargs in ({"top_p": top_p}, {"top_p": 1.0}, {"top_k": 20_000, "top_p": top_p, "min_p": 1e-4}):
        token, _ = _sample(logits, seed=[8, 9], position=[70_000, 3], **kwargs)  # type: ignore[arg-type]
        want = [
            _reference(
                logits[i], 1.0, int(kwargs.get("top_k", 0)), kwargs["top_p"], kwargs.get("min_p", 0.0),
                (8, 9)[i], (70_000, 3)[i],
            )
            for i in range(2)
        ]  # fmt: skip
        assert token.tolist() == want


def test_strided_and_empty(rng: torch.Generator) -> None:
    wide = torch.randn(5, 300, generator=rng)
    assert_same_bytes(_sample(wide[:, 10:210], seed=3)[0], _sample(wide[:, 10:210].contiguous(), seed=3)[0])
    token, logprob = _sample(torch.empty(0, 10))
    assert token.shape == logprob.shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -0.5}, r"temperature\[0\] is -0.5; it must be finite and not negative"),
        ({"temperature": float("nan")}, r"temperature\[0\] is nan"),
        ({"top_k": -1}, r"top_k\[0\] is -1"),
        ({"top_p": 0.0}, r"top_p\[0\] is 0"),
        ({"top_p": 1.5}, r"top_p\[0\] is 1.5"),
        ({"min_p": -0.1}, r"min_p\[0\] is -0.1"),
        ({"position": -3}, r"row_position\[0\] is -3"),
        ({"seed": [1, 2]}, r"seed has shape \[2\]; it must be \[1\]"),
    ],
)
def test_bad_input(kwargs: dict, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        _sample(torch.zeros(1, 8), **kwargs)


def test_bad_logits() -> None:
    with pytest.raises(KernelError, match="logits has dtype bfloat16; it must be float32"):
        _sample(torch.zeros(1, 8).bfloat16())
    with pytest.raises(KernelError, match="vocabulary must not be empty"):
        _sample(torch.zeros(1, 0))
