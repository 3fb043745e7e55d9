# SPDX-License-Identifier: Apache-2.0
"""Writes the model in the Hugging Face layout: bfloat16 safetensors in shards, and its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .model import Nano, NanoConfig
from .world import BEGIN, END, PAD, SPECIAL_TOKENS

SHARD_BYTES = 16 * 2**20 - 65536
LAYER_NAMES = {
    "norm1": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_tensors(model: Nano) -> dict[str, Tensor]:
    """Returns the weights (bfloat16, on the CPU) under their transformers names."""
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm_out}
    for name, hf_name in LAYER_NAMES.items():
        for layer, weight in enumerate(getattr(model, name).unbind(0)):
            tensors[f"model.layers.{layer}.{hf_name}.weight"] = weight
    return {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors.items()}


def hf_config(config: NanoConfig) -> dict[str, object]:
    """Returns the contents of config.json."""
    special = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.positions,
        "rms_norm_eps": config.eps,
        # transformers 4 reads rope_theta, transformers 5 rope_parameters.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": special[BEGIN],
        "eos_token_id": special[END],
        "pad_token_id": special[PAD],
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(model: Nano, folder: Path, tokenizer: Path) -> None:
    """Writes the checkpoint.

    Args:
        model: the weights.
        folder: where to; existing shards are replaced.
        tokenizer: folder with tokenizer.json and tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in sorted(hf_tensors(model).items()):
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    config = hf_config(model.config)
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False, "max_new_tokens": 256})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).resolve() != (folder / name).resolve():
            shutil.copyfile(tokenizer / name, folder / name)
