# SPDX-License-Identifier: Apache-2.0
"""The stand-alone programs of bench/gpu: building them, running them, and what their checks say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench._env import ROOT

GPU = ROOT / "bench" / "gpu"
FAMILIES = ("attention", "dense")


def build(folder: Path, families: Sequence[str], jobs: int) -> int:
    """Builds the families' checks and benchmarks; make's exit code."""
    make = ["make", "-s", "-C", str(GPU), f"-j{jobs}", f"BUILD={folder}", *families]
    return subprocess.run(make, check=False).returncode


def run(
    command: Sequence[str],
    log: Path,
    cwd: Path = GPU,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Runs a program with its output in a file; the exit code, 124 if it took longer than `timeout` seconds."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            # All of it: a sanitizer that is killed alone leaves its program running on the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            return 124
        except BaseException:  # of a session of its own, it does not hear Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            raise


def check(family: str, folder: Path, work: Path) -> dict[str, Any]:
    """Runs a family's check; its exit code, its checks, and the end of the log where it failed."""
    path, log = work / f"{family}_check.json", work / f"{family}_check.log"
    started = time.perf_counter()
    code = run([str(folder / f"{family}_check"), str(path)], log)
    result: dict[str, Any] = {
        "check_exit_code": code,
        "check_seconds": round(time.perf_counter() - started, 1),
        "checks": entries(path),
    }
    if code:
        result["log"] = log.read_text().splitlines()[-10:]
    return result


def entries(path: Path) -> list[dict[str, Any]]:
    """What a program reported; one that was killed leaves a file without an end, or none."""
    text = path.read_text() if path.exists() else ""
    entries = text.removeprefix("[\n").removesuffix("\n]\n").split(",\n")
    return [json.loads(entry) for entry in entries if entry.rstrip().endswith("}")]


def met(row: Mapping[str, Any]) -> bool:
    """Whether a figure holds its bar: an upper bound, a lower one where the row says "least"."""
    return bool(row["ratio"] >= row["bar"] if row.get("least") else row["ratio"] <= row["bar"])


def figure(row: Mapping[str, Any], key: str, digits: int = 2) -> str:
    """Writes a row's "ratio" or "bar" with its unit."""
    bound = "at least " if key == "bar" and row.get("least") else ""
    return f"{bound}{row[key]:.{digits}f}{row.get('unit', 'x')}"


def say(family: str, result: Mapping[str, Any]) -> None:
    """Prints how many checks passed, and each that did not."""
    bad = [c for c in result["checks"] if not c["ok"]]
    code, seconds = result["check_exit_code"], result["check_seconds"]
    print(f"{family}: {len(result['checks'])} checks, {len(bad)} failed, exit code {code}, {seconds} s", flush=True)
    for line in [f"  FAILED {c['check']}: {c['detail']}" for c in bad] + result.get("log", []):
        print(line)
