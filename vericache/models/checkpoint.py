# SPDX-License-Identifier: Apache-2.0
"""Finding and loading models: a Hugging Face checkpoint folder, or by name a model shipped in the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vericache.errors import CheckpointError, UnsupportedModelError
from vericache.models.config import load_config
from vericache.models.llama import CausalLM
from vericache.models.rope import rope_tables
from vericache.models.weights import Progress, load_weights

ASSETS = Path(__file__).resolve().parent.parent / "assets"

STORAGE_DTYPES = (torch.float32, torch.bfloat16)


def list_models() -> tuple[str, ...]:
    """Names of the models shipped with the package."""
    return tuple(sorted(path.parent.name for path in ASSETS.glob("*/config.json")))


def find_model(name_or_path: str | Path) -> Path:
    """The folder of an embedded model (by its exact name) or of a checkpoint on disk.

    A shipped name wins over a folder of the same name in the working directory; write ./name for the folder.

    Raises:
        CheckpointError: neither; the message lists the shipped names.
    """
    if str(name_or_path) in list_models():
        return ASSETS / str(name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    known = ", ".join(list_models()) or "none"
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file; name the folder that holds config.json and *.safetensors."
        )
    raise CheckpointError(
        f"there is no folder {str(name_or_path)!r} and no shipped model of that name (shipped: {known})."
    )


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    max_positions: int | None = None,
    progress: Progress | None = None,
) -> CausalLM:
    """Loads a checkpoint.

    Args:
        name_or_path: see `find_model`.
        device: where weights and rotary tables shall lie.
        dtype: storage dtype of weights, activations and KV, float32 or bfloat16; None takes the checkpoint's
            (float16 becomes bfloat16).
        max_positions: positions to serve; None takes the checkpoint's own. Fewer saves table memory; more is
            possible for linear and dynamic RoPE scaling, up to factor * max_position_embeddings. With dynamic
            scaling the rotation of every request depends on this number (see `rope.py`).
        progress: called with (bytes read, bytes in all).

    Raises:
        CheckpointError: missing, truncated, inconsistent or non-finite files.
        UnsupportedModelError: an architecture, field, dtype or position count that is not served.
    """
    folder = find_model(name_or_path)
    config = load_config(folder)
    dtype = config.dtype if dtype is None else dtype
    if dtype not in STORAGE_DTYPES:
        raise UnsupportedModelError(
            f"the storage dtype {dtype} is not supported; torch.float32 and torch.bfloat16 are."
        )
    positions = config.max_positions if max_positions is None else max_positions
    config = replace(config, dtype=dtype, max_positions=positions)
    cos, sin = rope_tables(config.rope, positions)
    device = torch.device(device)
    weights = load_weights(folder, config, dtype, device, progress)
    return CausalLM(config, weights, cos.to(device), sin.to(device))
