# SPDX-License-Identifier: Apache-2.0
"""`compare` must be able to say no: a planted fault is found, named and turned into exit code 1."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vericache.cli import common, main
from vericache.cli.compare import Difference, first_difference, top2_gap
from vericache.cli.report import marked
from vericache.outputs import RequestOutput, RequestStats

FULL = [10, 20, 30, 40]


def output(tokens: list[int], mode: str = "full", logits: list[torch.Tensor] | None = None) -> RequestOutput:
    rounds = 2 if mode == "vericache" else 0
    stats = RequestStats(
        mode=mode, rounds=rounds, accepted=4 if rounds else 0, emitted=len(tokens), decode_s=1.0
    )
    text = " ".join(map(str, tokens))
    return RequestOutput(1, 100, tokens, text, None, "length", None, stats, logits)


@pytest.mark.parametrize(
    ("other", "index", "expected", "got"),
    [
        ([10, 20, 31, 40], 2, 30, 31),
        ([11, 20, 30, 40], 0, 10, 11),
        ([10, 20, 30], 3, 40, None),
        ([10, 20, 30, 40, 50], 4, None, 50),
        ([], 0, 10, None),
    ],
)
def test_first_difference(other: list[int], index: int, expected: int | None, got: int | None) -> None:
    assert first_difference(output(FULL), output(other)) == Difference(index, expected, got, None)


def test_no_difference() -> None:
    assert first_difference(output(FULL), output(list(FULL))) is None
    assert first_difference(output([]), output([])) is None


def test_gap_is_of_the_full_rows() -> None:
    rows = [torch.tensor([0.0, 5.0, 1.0, 4.75]) for _ in FULL]
    assert top2_gap(rows[0]) == 0.25
    found = first_difference(output(FULL, logits=rows), output([10, 20, 31, 40]))
    assert found is not None and found.top2_gap == 0.25


def test_marked_texts() -> None:
    left, right = marked('{"order": "tulip-356"}', '{"order": "tulip-843"}', same=17)
    assert left.plain == '{"order": "tulip-356"}' and right.plain == '{"order": "tulip-843"}'
    styled = {right.plain[span.start : span.end] for span in right.spans if "red" in str(span.style)}
    assert styled and "".join(sorted(styled)) and all(piece in "843" for piece in styled)
    long_left, _ = marked("a" * 5000, "a" * 2000 + "b" * 3000, same=2000)
    assert (
        long_left.plain.startswith("...") and long_left.plain.endswith("...") and len(long_left.plain) < 1000
    )


class PlantedLLM:
    """Stands for an engine whose vericache mode emits what it is told to."""

    def __init__(self, mode: str, tokens: dict[str, list[int]]) -> None:
        self.mode, self.tokens = mode, tokens

    def generate(self, prompts: list[str], params: Any) -> list[RequestOutput]:
        logits = [torch.tensor([1.0, 0.5])] * len(FULL) if self.mode == "full" else None
        return [output(self.tokens[self.mode], self.mode, logits) for _ in prompts]


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_fault_is_reported(
    fault: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"full": FULL, "lossy": [10, 99], "vericache": [10, 20, 31, 40] if fault else FULL}
    monkeypatch.setattr(common, "load", lambda mode, *rest, **named: PlantedLLM(mode, tokens))
    code = main(["compare", "a prompt", *(["--json"] if as_json else [])])
    out = capsys.readouterr().out
    assert code == int(fault)
    if as_json:
        result = json.loads(out)
        assert result["vericache_identical"] is not fault
        planted = {"index": 2, "expected": 30, "got": 31, "top2_gap": 0.5} if fault else None
        assert result["prompts"][0]["vericache"]["first_difference"] == planted
        assert result["prompts"][0]["lossy"]["first_difference"]["index"] == 1
    else:
        assert ("FAULT, prompt 1: vericache differs first at token 2" in out) is fault
        assert ("identical to full KV" in out) is not fault
        assert "lossy differs first at token 1" in out
