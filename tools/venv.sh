#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the virtual environment that the Makefile uses: tools/venv.sh FOLDER
#
# PYTHON (default python3) is the interpreter. If it has a torch with CUDA, that torch is used and left alone; if not,
# TORCH (default torch==2.13.0) is installed with pip.
set -euo pipefail
venv=${1:?usage: tools/venv.sh FOLDER}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "vericache needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON." >&2; exit 1; }

if "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
  "$python" -m venv --system-site-packages "$venv"
  # --system-site-packages skips the packages of an interpreter that is itself in a virtual environment.
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > "$site/torch_of_parent.pth"
else
  "$python" -m venv "$venv"
  # shellcheck disable=SC2086  # TORCH may carry pip options
  "$venv/bin/python" -m pip install -qq $torch
fi

# A machine without a network but with everything in place still works. CMake and ninja may be the system's.
if ! { PATH=$venv/bin:$PATH command -v cmake && PATH=$venv/bin:$PATH command -v ninja && "$venv/bin/python" -c 'import \
     hypothesis, jinja2, numpy, pytest, rich, safetensors, setuptools, tokenizers, transformers, typer'; } \
     >/dev/null 2>&1; then
  "$venv/bin/python" -m pip install -qq --requirement "$(dirname "$0")/../requirements-dev.txt"
fi
"$venv/bin/python" -c 'import sys, torch; print(f"{sys.prefix}: Python {sys.version.split()[0]}, torch {torch.__version__}")'
