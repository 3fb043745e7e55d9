# SPDX-License-Identifier: Apache-2.0
"""What the compiled CUDA kernels take of a multiprocessor: registers, stack and spills, read from what ptxas reports.

resource_report.py compile NVCC ARGUMENTS...    run the compiler; keep ptxas's report beside the object it wrote
resource_report.py report OBJECT...             print the table of these objects' reports

CMakeLists.txt uses both. `report` exits with 1 if a kernel of --strict families and --strict-arch has a stack frame or
spills: its registers did not suffice, and memory traffic that nobody counted would hide in the timings.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPORT_SUFFIX = ".ptxas"
STRICT_FAMILIES = "*attention*,linear*"
STRICT_ARCH = "sm_90a"

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_INFO = re.compile(r"^(ptxas info\s*:|\s+\d+ bytes stack frame,)")


@dataclass(frozen=True)
class Kernel:
    """One kernel's report. Bytes are a thread's, those of the functions it calls included."""

    family: str
    arch: str
    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def clean(self) -> bool:
        """Whether it keeps everything in registers."""
        return self.stack == self.spill_stores == self.spill_loads == 0


def parse(text: str, family: str) -> list[Kernel]:
    """The kernels of one report.

    Args:
        text: ptxas's output under -v.
        family: the source file that it belongs to.

    Raises:
        ValueError: a kernel without its registers or its frame: the format is not the one known here.
    """
    kernels = []
    for part in re.split(r"(?=ptxas info\s*: Compiling entry function)", text):
        entry = _ENTRY.search(part)
        if entry is None:
            continue
        frames, used = _FRAME.findall(part), _USED.search(part)
        if not frames or used is None:
            raise ValueError(f"the report of {family} says nothing of the registers or the stack of {entry[1]}")
        stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
        kernels.append(Kernel(family, entry[2], entry[1], int(used[1]), stack, stores, loads))
    return kernels


def table(kernels: Iterable[Kernel]) -> str:
    """A row for each family and architecture: the most that one of its kernels takes."""
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.family, kernel.arch].append(kernel)
    lines = [f"{'kernels':18} {'arch':8} {'count':>5} {'registers':>9} {'stack':>6} {'spill stores':>12} {'loads':>6}"]
    for (family, arch), group in sorted(groups.items()):
        registers, stack = max(k.registers for k in group), max(k.stack for k in group)
        stores, loads = max(k.spill_stores for k in group), max(k.spill_loads for k in group)
        lines.append(f"{family:18} {arch:8} {len(group):5} {registers:9} {stack:6} {stores:12} {loads:6}")
    return "\n".join(lines)


def violations(kernels: Iterable[Kernel], families: str = STRICT_FAMILIES, arch: str = STRICT_ARCH) -> list[Kernel]:
    """The kernels that must keep everything in registers and do not."""
    patterns = families.split(",")
    return [
        k for k in kernels if not k.clean and k.arch == arch and any(fnmatch.fnmatch(k.family, p) for p in patterns)
    ]


def report(objects: Sequence[Path], families: str, arch: str) -> int:
    """Prints the table; 1 if the rule is broken or a report is missing."""
    kernels = []
    for path in objects:
        log = path.with_name(path.name + REPORT_SUFFIX)
        if not log.exists():
            print(f"resource_report: {path.name} was compiled without a report; delete it and build again.")
            return 1
        kernels += parse(log.read_text(), path.name.split(".")[0])
    print(table(kernels))
    broken = violations(kernels, families, arch)
    for k in broken:
        print(
            f"resource_report: {demangled(k.name)} of {k.family} for {k.arch} has a stack frame of {k.stack} bytes and "
            f"spills {k.spill_stores} bytes; it must keep everything in its {k.registers} registers."
        )
    return int(bool(broken))


def demangled(name: str) -> str:
    """The name as the source has it, if c++filt is there to tell."""
    tool = shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() or name if tool else name


def compile_with_report(command: Sequence[str]) -> int:
    """Runs nvcc with ptxas's report on; what else the compiler says is passed on."""
    done = subprocess.run([*command, "-Xptxas", "-v"], stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines(keepends=True)
    sys.stderr.writelines(line for line in lines if not _INFO.match(line))
    if done.returncode == 0 and "-o" in command:
        target = Path(command[command.index("-o") + 1])
        target.with_name(target.name + REPORT_SUFFIX).write_text("".join(line for line in lines if _INFO.match(line)))
    return done.returncode


def main(argv: Sequence[str]) -> int:
    """Compiles or reports."""
    if argv[:1] == ["compile"]:
        return compile_with_report(argv[1:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", choices=["report"])
    parser.add_argument("objects", nargs="+", type=Path)
    parser.add_argument("--strict", default=STRICT_FAMILIES, help="patterns of families, comma separated")
    parser.add_argument("--strict-arch", default=STRICT_ARCH)
    arguments = parser.parse_args(argv)
    return report(arguments.objects, arguments.strict, arguments.strict_arch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
