# SPDX-License-Identifier: Apache-2.0
"""Whether the CUDA kernels and the engine are right on this GPU: every check in one call, one JSON file.

Builds the stand-alone programs of bench/gpu, runs their checks (bitwise over row counts, accuracy, untouched memory),
runs small cases of every kernel under compute-sanitizer's memcheck and racecheck, and runs the tests marked cuda.

    python -m bench.gpu_checks                        all of it
    python -m bench.gpu_checks --skip sanitizer       without a part

Exit code 1 if anything failed. Where compute-sanitizer is not installed its part is skipped, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench._env import ROOT, environment
from bench.gpu_programs import FAMILIES, build, check, run, say

PARTS = ("checks", "sanitizer", "pytest")
TOOLS = ("memcheck", "racecheck")
# The small cases, cut so that each run takes some seconds: program, arguments.
SMALL = (
    ("attention", ["", "quick"]),
    *(("dense", ["--quick", "--only", part]) for part in ("linear", "rope", "layer", "sample", "pages", "window")),
)


def sanitize(
    tool: str, family: str, arguments: Sequence[str], folder: Path, work: Path, seconds: int
) -> dict[str, Any]:
    """Some of a program's small cases under one tool of compute-sanitizer."""
    program = " ".join([f"{family}_check", *filter(None, arguments)])
    log = work / f"{program} {tool}.log".replace(" ", "_")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    started = time.perf_counter()
    code = run([*command, str(folder / f"{family}_check"), *arguments], log, timeout=seconds)
    lines = log.read_text(errors="replace").splitlines()
    summary = next((line.lstrip("= ") for line in reversed(lines) if "SUMMARY" in line), None)
    # "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)". Hazards alone have
    # left the exit code 0.
    clean = code == 0 and summary is not None and re.search(r"ERROR SUMMARY: 0 errors|\b0 hazards", summary) is not None
    result = {
        "tool": tool,
        "program": program,
        "exit_code": code,
        "clean": clean,
        "seconds": round(time.perf_counter() - started, 1),
        "summary": summary or f"no summary within {seconds} s",
        "checks_run": sum(line.startswith(("ok ", "FAIL ")) for line in lines),
    }
    if not clean:
        result["log"] = [line for line in lines if line.startswith("=")][:30] + lines[-5:]
    print(f"{tool} {program}: {result['summary']}, exit code {code}, {result['checks_run']} checks, "
          f"{result['seconds']} s", flush=True)  # fmt: skip
    for line in result.get("log", []):
        print(f"  {line}")
    return result


def sanitizer_version() -> str | None:
    """compute-sanitizer's version, None where it is not installed."""
    if shutil.which("compute-sanitizer") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "version"
        run(["compute-sanitizer", "--version"], log)
        return next((line for line in log.read_text().splitlines() if "Version" in line), "unknown")


def run_pytest(arguments: Sequence[str], results: Path, work: Path) -> dict[str, Any]:
    """The tests marked cuda."""
    log = work / "pytest.log"
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "--durations=8", *arguments]
    code = run(command, log, cwd=ROOT, environment={**os.environ, "VERICACHE_RESULTS": str(results)})
    lines = log.read_text(errors="replace").splitlines()
    result = {
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "summary": next((line.strip("= ") for line in reversed(lines) if " in " in line), ""),
        "slowest": [line for line in lines if " call " in line or " setup " in line],
    }
    if code:
        result["log"] = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))][:60] + lines[-5:]
    return result


def bitwise_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every check that compared rows among others with the same rows alone."""
    keys = ("shape", "row_counts", "compared", "different", "control_noticed")
    checks = [c for family in FAMILIES for c in result.get(family, {}).get("checks", []) if "compared" in c]
    return [{key: c[key] for key in keys} for c in checks]


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, checks, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu", help="where the programs are built")
    parser.add_argument("--jobs", type=int, default=16, help="compilers at once")
    parser.add_argument("--pytest", default="", help="further arguments of pytest, in one string")
    parser.add_argument("--sanitizer-seconds", type=int, default=200, help="limit of each run under compute-sanitizer")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-checks.json")
    arguments = parser.parse_args(argv)
    folder, out = arguments.build.resolve(), arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if code := build(folder, FAMILIES, arguments.jobs):
        return code
    print(f"programs built in {time.perf_counter() - started:.0f} s", flush=True)
    result: dict[str, Any] = {"environment": environment("cuda")}
    failed = False
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(TOOLS) * len(SMALL)) as pool:
        work = Path(name)
        if "checks" not in arguments.skip:
            for family in FAMILIES:
                result[family] = check(family, folder, work)
                say(family, result[family])
                failed |= result[family]["check_exit_code"] != 0
            result["bitwise"] = bitwise_rows(result)
        version = None if "sanitizer" in arguments.skip else sanitizer_version()
        # Beside one another, but not beside the tests, which they slow down many times.
        submitted = [
            pool.submit(sanitize, tool, family, cases, folder, work, arguments.sanitizer_seconds)
            for family, cases in SMALL
            for tool in TOOLS
            if version
        ]
        sanitized = [run.result() for run in submitted]
        if "pytest" not in arguments.skip:
            result["pytest"] = run_pytest(shlex.split(arguments.pytest), out.parent, work)
            print(f"pytest -m cuda: {result['pytest']['summary']}", flush=True)
            for line in result["pytest"].get("log", []):
                print(f"  {line}")
            failed |= result["pytest"]["exit_code"] != 0
        if "sanitizer" not in arguments.skip:
            result["sanitizer"] = {"version": version, "runs": sanitized}
            if version is None:
                print("compute-sanitizer is not on the PATH: memcheck and racecheck were skipped", flush=True)
            failed |= any(not one["clean"] for one in sanitized)
    out.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
