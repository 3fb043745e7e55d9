# SPDX-License-Identifier: Apache-2.0
"""Safetensors files of a checkpoint folder -> fused weights on the device.

Every complaint names the file and the tensor: a checkpoint fails to load, or it is complete, finite and of
the shape its config.json says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vericache.errors import CheckpointError, UnsupportedModelError
from vericache.models.config import ModelConfig
from vericache.models.fields import read_json
from vericache.models.llama import LayerWeights, ModelWeights

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Progress = Callable[[int, int], None]


class TensorFiles:
    """The tensors of a checkpoint folder by name. Opening checks that every file is whole.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the shards it lists.

    Raises:
        CheckpointError: no safetensors, a listed shard missing, or a file that is truncated or not
        safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        names, listed = _locate(folder)
        self._open = {}
        stored: dict[str, str] = {}
        for name in names:
            stored |= dict.fromkeys(_read_header(folder / name), name)
            try:
                self._open[name] = safe_open(folder / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{name} cannot be read as safetensors ({error}); download it again."
                ) from None
        lost = next((key for key, name in listed.items() if stored.get(key) != name), None)
        if lost is not None:
            raise CheckpointError(
                f"{listed[lost]} does not hold the tensor {lost} that {INDEX_NAME} lists there; download "
                "both again."
            )
        self.file_of = stored
        self.total_bytes = sum((folder / name).stat().st_size for name in self._open)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: missing, of another shape, or with a NaN or an infinity.
            UnsupportedModelError: not a floating dtype this package reads.
        """
        file = self.file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder.name} lacks the tensor {name}; the checkpoint is incomplete."
            )
        tensor: Tensor = self._open[file].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file}: the tensor {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(shape)}."
            )
        if tensor.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{file}: the tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; float32, "
                "bfloat16, float16 "
                "and float64 are supported."
            )
        # One pass, no temporary: a NaN comes out of both ends, an infinity out of one.
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise CheckpointError(
                f"{file}: the tensor {name} holds a NaN or an infinity; the file is damaged."
            )
        return tensor


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> ModelWeights:
    """Reads, checks, converts and fuses all weights.

    Args:
        folder: checkpoint folder.
        config: its parsed config.json.
        dtype: storage dtype, float32 or bfloat16.
        device: where the weights shall lie.
        progress: called with (bytes read, bytes in all) as tensors arrive.

    Raises:
        CheckpointError, UnsupportedModelError: see `TensorFiles`; also tensors the config does not account
        for.
    """
    files = TensorFiles(folder)
    seen: set[str] = set()
    done = 0

    def fused(names: list[str], rows: list[int], *rest: int) -> Tensor:
        nonlocal done
        target = torch.empty((sum(rows), *rest), dtype=dtype, device=device)
        start = 0
        for name, count in zip(names, rows, strict=True):
            source = files.read(name, (count, *rest))
            target[start : start + count] = source
            start += count
            seen.add(name)
            done += source.nbytes
            if progress is not None:
                progress(min(done, files.total_bytes), files.total_bytes)
        return target

    c = config
    q_size, kv_size = c.q_heads * c.head_dim, c.kv_heads * c.head_dim

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}."
        attention, mlp = at + "self_attn.", at + "mlp."
        qkv, gate_up = (
            [attention + p for p in ("q_proj", "k_proj", "v_proj")],
            [mlp + "gate_proj", mlp + "up_proj"],
        )
        qkv_rows, gate_up_rows = [q_size, kv_size, kv_size], [c.intermediate_size] * 2
        return LayerWeights(
            input_norm=fused([at + "input_layernorm.weight"], [c.hidden_size]),
            qkv=fused([p + ".weight" for p in qkv], qkv_rows, c.hidden_size),
            qkv_bias=fused([p + ".bias" for p in qkv], qkv_rows) if c.qkv_bias else None,
            q_norm=fused([attention + "q_norm.weight"], [c.head_dim]) if c.qk_norm else None,
            k_norm=fused([attention + "k_norm.weight"], [c.head_dim]) if c.qk_norm else None,
            out=fused([attention + "o_proj.weight"], [c.hidden_size], q_size),
            out_bias=fused([attention + "o_proj.bias"], [c.hidden_size]) if c.o_bias else None,
            post_norm=fused([at + "post_attention_layernorm.weight"], [c.hidden_size]),
            gate_up=fused([p + ".weight" for p in gate_up], gate_up_rows, c.hidden_size),
            gate_up_bias=fused([p + ".bias" for p in gate_up], gate_up_rows) if c.mlp_bias else None,
            down=fused([mlp + "down_proj.weight"], [c.hidden_size], c.intermediate_size),
            down_bias=fused([mlp + "down_proj.bias"], [c.hidden_size]) if c.mlp_bias else None,
        )

    embedding = fused(["model.embed_tokens.weight"], [c.vocab_size], c.hidden_size)
    layers = tuple(layer(index) for index in range(c.layers))
    final_norm = fused(["model.norm.weight"], [c.hidden_size])
    lm_head = embedding if c.tied else fused(["lm_head.weight"], [c.vocab_size], c.hidden_size)
    for name in sorted(set(files.file_of) - seen):
        # Old exporters wrote the rotary frequencies; some write the head of a tied model a second time.
        if not name.endswith("rotary_emb.inv_freq") and not (c.tied and name == "lm_head.weight"):
            raise CheckpointError(
                f"{files.file_of[name]} holds the tensor {name}, which config.json does not account for; the "
                "two do not "
                "belong together."
            )
    return ModelWeights(embedding, layers, final_norm, lm_head)


def _locate(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files, and the index: tensor name -> file name ({} for a single file)."""
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME], {}
    if (folder / INDEX_NAME).is_file():
        entries = read_json(folder / INDEX_NAME, needed=True).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(f"{INDEX_NAME} of {folder} has no weight_map; download it again.")
        names = sorted(set(entries.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {', '.join(missing)}, which {INDEX_NAME} lists; download it."
            )
        return names, entries
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pth")
    )
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]} but no safetensors; pickled weights can run code and are not read: "
            "convert "
            "them with transformers' save_pretrained."
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.")


def _read_header(path: Path) -> list[str]:
    """Names of a file's tensors. Compares its size with what its header announces: the reader's message names
    neither.

    Raises:
        CheckpointError: truncated, a Git LFS pointer, or not safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if (prefix + file.read(64)).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{path.name} is a Git LFS pointer, not the weights; run 'git lfs pull'.")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > size - 8:
            raise CheckpointError(f"{path.name} is truncated: it ends inside its header; download it again.")
        file.seek(8)
        try:
            header = json.loads(file.read(header_bytes))
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise CheckpointError(f"{path.name} is not a safetensors file; download it again.") from None
    expected = 8 + header_bytes + end
    if size < expected:
        raise CheckpointError(
            f"{path.name} is truncated: it has {size} bytes where its header announces {expected}; download "
            "it again."
        )
    return list(header)
