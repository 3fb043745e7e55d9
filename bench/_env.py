# SPDX-License-Identifier: Apache-2.0
"""Where a figure was measured: every result file starts with this block."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vericache

ROOT = Path(__file__).resolve().parent.parent


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fingerprint() -> str:
    """Hashes what decides the tokens: package, kernels, shipped weights. Results of two hashes do not mix."""
    digest = hashlib.sha256()
    for folder, patterns in (
        ("vericache", ("*.py", "*.safetensors", "*.json")),
        ("csrc", ("*.h", "*.cpp", "*.cu*")),
    ):
        for path in sorted({p for pattern in patterns for p in (ROOT / folder).rglob(pattern)}):
            if "cli" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def command_line() -> str:
    """The command that runs now, without folders of the machine."""
    return shlex.join([Path(sys.executable).name, "-m", *_module(sys.argv)])


def environment(device: str) -> dict[str, Any]:
    """Describes the machine, the versions and the command.

    Args:
        device: `cpu` or `cuda`, where the figures come from.
    """
    gpu: dict[str, Any] = {}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        gpu = {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": driver[0] if driver else "unknown",
            "cuda": torch.version.cuda,
        }
    return {
        "date": date.today().isoformat(),
        "device": device,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        **gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vericache": vericache.__version__,
        # A copy of the tree on another machine may carry an older history: there the variable says what it is.
        "commit": os.environ.get("VERICACHE_COMMIT") or _output("git", "rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
        "fingerprint": fingerprint(),
        "command": command_line(),
    }


def _module(argv: list[str]) -> list[str]:
    # A result is published: it names no folder of the machine but the repository's own.
    words = [_portable(word) for word in argv]
    first = Path(argv[0]).resolve()
    name = first.parent.name if first.name == "__main__.py" else words[0].removesuffix(".py").replace("/", ".")
    return [name, *words[1:]]


def _portable(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
