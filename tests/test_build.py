# SPDX-License-Identifier: Apache-2.0
"""The package without its compiled half, the build without torch, and what `import vericache` costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import vericache

ROOT = Path(vericache.__file__).resolve().parent


def _python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_is_light(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); import vericache; print('torch' in sys.modules)"
    assert _python(code, tmp_path).stdout.strip() == "False"


def test_unknown_attribute() -> None:
    assert not hasattr(vericache, "no_such_name")


def test_missing_extension_is_one_clear_sentence(tmp_path: Path) -> None:
    package = tmp_path / "vericache"
    package.mkdir()
    for name in ("__init__.py", "ops.py", "_fake.py", "errors.py"):
        shutil.copy(ROOT / name, package / name)
    result = _python("import vericache.ops", tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: vericache's compiled module vericache._C cannot be loaded")
    assert "pip install --no-build-isolation ." in last


def test_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    setup = ROOT.parent / "setup.py"
    if not setup.exists():  # running against an installed wheel
        return
    shutil.copy(setup, tmp_path / "setup.py")
    code = (
        "import importlib.util as u, runpy, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    result = _python(code, tmp_path)
    assert result.returncode == 1
    assert "install torch first, then run `pip install --no-build-isolation .`" in result.stderr
