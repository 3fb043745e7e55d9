# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, check before they time, and their checks can fail."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from torch import Tensor

from bench import decode_step, gpu_checks, gpu_kernels, gpu_programs, tables
from bench.kernel_trace import short
from vericache.models import llama

TINY = ["--tiny", "--device", "cpu", "--layers", "2", "--out"]


def test_decode_step(tmp_path: Path) -> None:
    out = tmp_path / "decode-step.json"
    assert decode_step.main([*TINY, str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["rows"] for row in result["rows"]] == [8, 8, 1, 1, 38, 8]
    assert all(row["ms"]["median"] > 0 and row["kv_bytes"] > 0 for row in result["rows"])
    assert "8 x 8K" in tables.decode_step(result)


def test_decode_step_notices_a_row_that_depends_on_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = llama.ops.linear

    def by_row_count(x: Tensor, *rest: object, **options: object) -> Tensor:
        out = original(x, *rest, **options)  # type: ignore[arg-type]
        return out if x.shape[0] == 1 else out * 1.01

    monkeypatch.setattr(llama.ops, "linear", by_row_count)
    assert decode_step.main([*TINY, str(tmp_path / "x.json"), "--only", "8 x 8K"]) == 1


def test_short_kernel_names() -> None:
    name = "void vericache::cuda::(anonymous namespace)::norm_rows<__nv_bfloat16, 1>(vericache::RmsNormParams, bool)"
    assert short(name) == "norm_rows<__nv_bfloat16, 1>"


def test_entries_of_a_killed_check(tmp_path: Path) -> None:
    path = tmp_path / "attention_check.json"
    path.write_text('[\n  {"check": "a", "ok": true, "detail": "b, c"},\n  {"che')
    assert [entry["check"] for entry in gpu_programs.entries(path)] == ["a"]
    assert gpu_programs.entries(tmp_path / "none") == []


def test_bars_from_below_and_above() -> None:
    rates = {
        "copy kernel 1 GiB, read + written": 4000.0,
        "kv_quantize bits=2": 2799.0,
        "read kernel 1 GiB": 4600.0,
        "window_scores tokens=131072 window=32": 1610.0,
        "plain copy from pinned, bytes of output": 50.0,
        "bf16_unpack staged, bytes of output": 60.0,
        "bf16_unpack from HBM, bytes of output": 1990.0,
    }
    bars = gpu_kernels.rate_bars(dict.fromkeys(rates, 1.0), rates, {"bf16_pack bits an element": 12.06})
    said = {row["what"]: (gpu_programs.met(row), gpu_programs.figure(row, "ratio")) for row in bars}
    assert said == {
        "kv_quantize bits=2": (False, "0.70x"),
        "window_scores 128K tokens": (True, "0.35x"),
        "bf16_unpack staged": (True, "1.20x"),
        "bf16_unpack from HBM": (False, "1.99 TB/s"),
        "bf16_pack, normal distribution": (True, "12.06 bits"),
    }
    assert [gpu_programs.figure(row, "bar") for row in bars] == [
        "at least 0.70x", "at least 0.30x", "at least 1.20x", "at least 2.00 TB/s", "12.20 bits"
    ]  # fmt: skip
    environment = {"gpu": "none", "torch": "", "python": "", "commit": "", "date": "", "command": ""}
    table = tables.kernels({"dense": {"bars": bars}, "environment": environment})
    assert "| bf16_unpack staged | 1.0 | plain copy, rate of output | 1.20x | at least 1.20x | yes |" in table


def test_bitwise_table() -> None:
    row = {"shape": "full 8x4K", "row_counts": "1 to 128", "compared": 9, "different": 0, "control_noticed": True}
    checks = [{"check": "x", "ok": True, "detail": ""}, {"check": "bitwise", "ok": True, "detail": "", **row}]
    result = {"attention": {"checks": checks}, "dense": {"checks": []}}
    assert gpu_checks.bitwise_rows(result) == [row]


def test_a_program_over_its_time_ends_with_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_programs.run(["sh", "-c", "sleep 60 & echo $!; wait"], log, timeout=1.0) == 124
    child = Path(f"/proc/{int(log.read_text())}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
    assert gpu_programs.run(["sh", "-c", "exit 3"], log, timeout=10.0) == 3


@pytest.mark.parametrize(
    ("summary", "code", "clean"),
    [
        ("ERROR SUMMARY: 0 errors", 0, True),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("RACECHECK SUMMARY: 4 hazards displayed (340 errors, 0 warnings)", 0, False),
        ("RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)", 0, False),
        ("RACECHECK SUMMARY: 10 hazards displayed (0 errors, 10 warnings)", 0, False),
        ("ERROR SUMMARY: 20 errors", 9, False),
        ("no summary", 0, False),
    ],
)
def test_what_the_sanitizer_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: str, code: int, clean: bool
) -> None:
    def program(command: object, log: Path, **options: object) -> int:
        log.write_text(f"========= COMPUTE-SANITIZER\nok   a\n========= {summary}\n")
        return code

    monkeypatch.setattr(gpu_checks, "run", program)
    said = gpu_checks.sanitize("racecheck", "dense", ["--quick"], tmp_path, tmp_path, 9)
    assert said["clean"] == clean and said["checks_run"] == 1 and ("log" in said) != clean
