# SPDX-License-Identifier: Apache-2.0
"""Drive CMake and ninja; everything else about the package is in pyproject.toml.

Environment: VERICACHE_CUDA (auto, on, off), VERICACHE_CUDA_ARCHS ("90a" or "80;89;90a;120"),
VERICACHE_CPU_ARCH (default native), VERICACHE_BUILD_DIR (keeps objects between builds), MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Build vericache._C with CMake against the installed torch."""

    def build_extension(self, ext: Extension) -> None:
        if importlib.util.find_spec("torch") is None:
            sys.exit(
                "vericache builds against the torch that is installed, and this Python has none: install torch "
                "first, then run `pip install --no-build-isolation .`"
            )
        default_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir = Path(os.environ.get("VERICACHE_BUILD_DIR", default_dir)).resolve()
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        for name in ("VERICACHE_CUDA", "VERICACHE_CUDA_ARCHS", "VERICACHE_CPU_ARCH"):
            if name in os.environ:
                options.append(f"-D{name}={os.environ[name]}")
        cmake, ninja = _tool("cmake"), _tool("ninja")
        options.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        _run([cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *options])
        _run([cmake, "--build", str(build_dir), "--target", "vericache_module", "-j", jobs])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        (built,) = build_dir.glob("_C.*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        # Rename over the old file: a process that has it mapped keeps its own copy.
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy2(built, fresh)
        os.replace(fresh, target)


def _tool(name: str) -> str:
    """Path of a build tool; the one of this Python's environment goes before the system's."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        sys.exit(f"vericache needs {name} to build: run `pip install {name}`, then build again.")
    return path


def _run(command: list[str]) -> None:
    if (code := subprocess.run(command).returncode) != 0:
        sys.exit(f"vericache: `{command[0]} {command[1]}` failed with exit code {code}; its output is above.")


setup(ext_modules=[Extension("vericache._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
