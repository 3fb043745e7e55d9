# SPDX-License-Identifier: Apache-2.0
"""The build's resource report: what it reads, and that it fails where a kernel spills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.resource_report import parse, table, violations

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "resource_report.py"


def log(name: str, arch: str = "sm_90a", registers: int = 96, stack: int = 0, spill: int = 0) -> str:
    """What ptxas -v of CUDA 13.0 writes for a kernel."""
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, {spill} bytes spill stores, {spill + 4 if spill else 0} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 1024 bytes smem\n"
        "ptxas info    : Compile time = 12.1 ms\n"
    )


HEAD = "ptxas info    : 0 bytes gmem\n"


def test_parse() -> None:
    first, second = parse(HEAD + log("_Z1av", registers=40) + log("_Z1bv", "sm_80", 255, 16, 8), "linear")
    assert (first.family, first.arch, first.name, first.registers, first.clean) == (
        "linear", "sm_90a", "_Z1av", 40, True,
    )  # fmt: skip
    assert (second.arch, second.stack, second.spill_stores, second.spill_loads) == ("sm_80", 16, 8, 12)
    assert not second.clean
    assert parse(HEAD, "empty") == []


def test_functions_that_a_kernel_calls_count() -> None:
    text = log("_Z1av").replace(
        "ptxas info    : Used",
        "ptxas info    : Function properties for _Z6calledv\n"
        "    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info    : Used",
    )
    assert parse(text, "linear")[0].stack == 24


def test_another_format_is_not_taken_for_clean() -> None:
    with pytest.raises(ValueError, match="says nothing of the registers"):
        parse("ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'\n", "linear")


def test_table_has_the_most_of_each_family() -> None:
    text = table(parse(log("_Z1av", registers=40) + log("_Z1bv", registers=90, stack=8), "norm"))
    assert text.splitlines()[1].split() == ["norm", "sm_90a", "2", "90", "8", "0", "0"]


@pytest.mark.parametrize(
    "family", ["paged_attention", "kept_attention", "linear", "linear_mma", "linear_narrow", "linear_wide"]
)
def test_spills_and_stack_frames_are_violations(family: str) -> None:
    kernels = parse(log("_Z2okv") + log("_Z7spillerv", spill=16, stack=16) + log("_Z5localv", stack=8), family)
    assert [k.name for k in violations(kernels)] == ["_Z7spillerv", "_Z5localv"]


def test_other_families_and_architectures_are_only_reported() -> None:
    assert violations(parse(log("_Z1av", spill=16, stack=16), "sampler")) == []
    assert violations(parse(log("_Z1av", "sm_80", spill=16, stack=16), "linear")) == []


def run_report(*objects: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), "report", *map(str, objects)], capture_output=True, text=True)


def test_exit_code(tmp_path: Path) -> None:
    good, bad, bare = (tmp_path / f"{name}.cu.o" for name in ("linear", "quant_attention", "norm"))
    Path(f"{good}.ptxas").write_text(HEAD + log("_Z4goodv"))
    Path(f"{bad}.ptxas").write_text(HEAD + log("_Z3badv", spill=32, stack=32))
    done = run_report(good)
    assert done.returncode == 0 and "linear" in done.stdout
    done = run_report(good, bad)
    assert done.returncode == 1
    assert "of quant_attention for sm_90a has a stack frame of 32 bytes and spills 32 bytes" in done.stdout
    done = run_report(good, bare)
    assert done.returncode == 1 and "norm.cu.o was compiled without a report" in done.stdout


def test_compile_keeps_the_report_and_passes_on_the_rest(tmp_path: Path) -> None:
    compiler, target = tmp_path / "nvcc", tmp_path / "linear.cu.o"
    said = tmp_path / "said"
    said.write_text(HEAD + log("_Z1av") + "linear.cu(3): warning: unused\n")
    compiler.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat {said} >&2\n')
    compiler.chmod(0o755)
    command = [sys.executable, str(SCRIPT), "compile", str(compiler), "-c", "linear.cu", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "linear.cu(3): warning: unused\n"
    assert (tmp_path / "arguments").read_text().split()[-2:] == ["-Xptxas", "-v"]
    assert "Used 96 registers" in Path(f"{target}.ptxas").read_text()
    compiler.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "broken\n")
