# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of each supported kind, written by transformers; a new kind is a new line here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 211
WINDOW = 13  # smaller than every prompt of the tests, and no multiple of a page or a chunk


@dataclass(frozen=True)
class Kind:
    """One checkpoint: a transformers family and the fields that differ from the common tiny shape."""

    name: str
    family: str
    fields: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# Attention has 4 query heads and 1 KV head (a group of 4) unless a line says otherwise.
KINDS = (
    Kind("llama2", "Llama", {"num_key_value_heads": 4}),
    Kind("llama-tied-group8", "Llama",
         {"tie_word_embeddings": True, "num_attention_heads": 8, "head_dim": 32}),
    Kind("llama3", "Llama",
         _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=64)),
    Kind("llama-biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Kind("llama-linear", "Llama", _rope("linear", factor=4.0)),
    Kind("llama-dynamic", "Llama", _rope("dynamic", factor=2.0)),
    Kind("llama-yarn", "Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    Kind("llama-yarn-mscale", "Llama",
         _rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0,
               truncate=False, beta_fast=16.0)),
    Kind("mistral", "Mistral", {"sliding_window": None}),
    Kind("mistral-window", "Mistral", {"sliding_window": WINDOW, "head_dim": 48}),
    Kind("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    Kind("qwen2-window", "Qwen2",
         {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    Kind("qwen3", "Qwen3", {"num_key_value_heads": 2, "head_dim": 64, "attention_bias": True}),
    Kind("qwen3-window", "Qwen3",
         {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW,
          "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
)  # fmt: skip


def write_checkpoint(
    kind: Kind, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "5GB"
) -> Any:
    """Saves a checkpoint of this kind; returns its transformers model in float32, rounded to `dtype`."""
    config_class = getattr(transformers, f"{kind.family}Config")
    model_class = getattr(transformers, f"{kind.family}ForCausalLM")
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 208,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **kind.fields,
    }
    config = config_class(**fields)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(20260101)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that greedy text does not settle on one token. Biases are not zero.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1 + 0.2 * noise if "norm" in name else 0.25 * noise).to(dtype).float())
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    # Read back, not cast back: a cast to bfloat16 rounds the rotary frequencies too.
    return model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@torch.no_grad()
def transformers_greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits rows, each from a fresh pass over the whole sequence."""
    ids, rows = list(prompt), []
    for _ in range(tokens):
        rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float())
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def kind_named(name: str) -> Kind:
    """The kind of this name."""
    return next(kind for kind in KINDS if kind.name == name)
