# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on this GPU: checked first, then timed beside cuDNN and cuBLAS in the same run.

Builds the stand-alone programs of bench/gpu, runs the checks, and only if every check passed runs the benchmarks.
Writes one JSON file with the machine, the checks, every time, and each bar's ratio.

    python -m bench.gpu_kernels                      all of it
    python -m bench.gpu_kernels --only attention     one family

Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._env import ROOT, environment
from bench.gpu_programs import FAMILIES, build, check, figure, met, run, say

BASELINES = {"attention": "bench.gpu.cudnn_baseline", "dense": "bench.gpu.cublas_baseline"}
ATTENTION_SHAPES = ("8x4K", "8x32K", "8x128K", "1x32K", "1x128K")
DRAFT_BARS = {"kept 0.25": 0.30, "int8": 0.60, "int4": 0.36, "int2": 0.26}
CODEC_PATHS = ("from pinned, blocks=0", "staged")
LINEAR_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))


def read(path: Path, field: str) -> dict[str, float]:
    """Name -> microseconds ("us"), rate ("gb_s") or another figure ("value"), from a benchmark's JSON."""
    data = json.loads(path.read_text())
    rows = data["results"] if isinstance(data, dict) else data
    return {" ".join(row["name"].split()): row[field] for row in rows if field in row}


def attention_bars(ours: dict[str, float], cudnn: dict[str, float]) -> list[dict[str, Any]]:
    """Ratios of the attention kernels to what each is held against."""
    rows = []
    for shape in ATTENTION_SHAPES:
        full, library = ours.get(f"full {shape}"), cudnn.get(f"cudnn 1 rows {shape}")
        if full and library:
            rows.append({"what": f"full {shape}", "against": "cuDNN", "us": full, "ratio": full / library, "bar": 1.0})
        for name, bar in DRAFT_BARS.items():
            draft = ours.get(f"{name} {shape}")
            if full and draft:
                rows.append({"what": f"{name} {shape}", "against": "own full", "us": draft,
                             "ratio": draft / full, "bar": bar})  # fmt: skip
        verify = ours.get(f"verify 32 rows {shape}")
        if full and verify:
            rows.append({"what": f"verify 32 rows {shape}", "against": "own one row", "us": verify,
                         "ratio": verify / full, "bar": 1.5})  # fmt: skip
    return rows


def dense_bars(ours: dict[str, float], cublas: dict[str, float]) -> list[dict[str, Any]]:
    """Ratios of the linear kernel, called as the model calls it, to cuBLAS at the same M; and their geometric mean."""
    rows: list[dict[str, Any]] = []
    for m in (1, 8, 64):
        for n, k in LINEAR_SHAPES:
            mine, library = ours.get(f"linear M={m} N={n} K={k} w_settled"), cublas.get(f"cublas M={m} N={n} K={k}")
            if mine and library:
                rows.append({"what": f"linear M={m} N={n} K={k}", "against": "cuBLAS", "us": mine,
                             "ratio": mine / library, "bar": 1.05})  # fmt: skip
    if rows:
        mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows))
        rows.append({"what": "linear, geometric mean", "against": "cuBLAS", "us": None, "ratio": mean, "bar": 0.95})
    return rows


def rate_bars(us: dict[str, float], gb_s: dict[str, float], values: dict[str, float]) -> list[dict[str, Any]]:
    """What moves bytes: quantize and gather against the copy kernel, window_scores against the read kernel, unpack
    against the link's copy and a rate."""
    rows: list[dict[str, Any]] = []

    def add(what: str, name: str, against: str, yardstick: float | None, bar: float, unit: str = "x") -> None:
        if yardstick and name in gb_s:
            rows.append({"what": what, "against": against, "us": us[name], "ratio": gb_s[name] / yardstick,
                         "bar": bar, "least": True, "unit": unit})  # fmt: skip

    copy, read_rate, link = (
        gb_s.get(name)
        for name in (
            "copy kernel 1 GiB, read + written",
            "read kernel 1 GiB",
            "plain copy from pinned, bytes of output",
        )
    )
    for name in ("kv_quantize bits=8", "kv_quantize bits=4", "kv_quantize bits=2", "gather_tokens ratio=0.25"):
        add(name, name, "copy kernel, rate", copy, 0.7)
    # K counts once, and past the L2 is read twice: a half is the most.
    add("window_scores 128K tokens", "window_scores tokens=131072 window=32", "read kernel, rate", read_rate, 0.3)
    for path in CODEC_PATHS:
        add(f"bf16_unpack {path}", f"bf16_unpack {path}, bytes of output", "plain copy, rate of output", link, 1.2)
    add("bf16_unpack from HBM", "bf16_unpack from HBM, bytes of output", "rate of output", 1000, 2.0, " TB/s")
    if bits := values.get("bf16_pack bits an element"):
        rows.append({"what": "bf16_pack, normal distribution", "against": "bits an element", "us": None,
                     "ratio": bits, "bar": 12.2, "unit": " bits"})  # fmt: skip
    return rows


def measure(family: str, folder: Path, work: Path) -> dict[str, Any]:
    """Checks and, if they pass, times one family."""
    result = check(family, folder, work)
    if result["check_exit_code"]:
        return result
    bench, baseline = work / f"{family}_bench.json", work / f"{family}_baseline.json"
    run([str(folder / f"{family}_bench"), str(bench)], work / f"{family}_bench.log")
    run([sys.executable, "-m", BASELINES[family], str(baseline)], work / f"{family}_baseline.log", cwd=ROOT)
    ours, theirs = read(bench, "us"), read(baseline, "us")
    result["us"], result["baseline_us"] = ours, theirs
    if family == "attention":
        result["bars"] = attention_bars(ours, theirs)
    else:
        result["gb_s"], result["values"] = read(bench, "gb_s"), read(bench, "value")
        result["bars"] = dense_bars(ours, theirs) + rate_bars(ours, result["gb_s"], result["values"])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, checks, times, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=FAMILIES, help="one family of kernels")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="where the programs are built")
    parser.add_argument("--jobs", type=int, default=16, help="compilers at once")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-kernels.json")
    arguments = parser.parse_args(argv)
    folder = arguments.build.resolve()
    families = [arguments.only] if arguments.only else list(FAMILIES)
    if code := build(folder, families, arguments.jobs):
        return code
    with tempfile.TemporaryDirectory() as name:
        result: dict[str, Any] = {"environment": environment("cuda")}
        for family in families:
            result[family] = measure(family, folder, Path(name))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    failed = 0
    for family in families:
        say(family, result[family])
        failed += bool(result[family]["check_exit_code"])
        for row in result[family].get("bars", []):
            us = "" if row["us"] is None else f"{row['us']:9.1f} us"
            ratio, bar = figure(row, "ratio", 3), figure(row, "bar")
            print(f"  {'ok ' if met(row) else 'NOT'} {row['what']:33} {us:12} {ratio} {row['against']} (bar: {bar})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
