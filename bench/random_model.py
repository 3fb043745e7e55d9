# SPDX-License-Identifier: Apache-2.0
"""Models of a real shape with random weights, drawn on the device: what a benchmark or a test needs of an 8B model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vericache.models.config import parse_config
from vericache.models.llama import CausalLM, LayerWeights, ModelWeights
from vericache.models.rope import rope_tables

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
QK_GAIN = 1.6  # of queries and keys


def random_llama(device: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> CausalLM:
    """A Llama of the 8B shape with random weights.

    Weights have the scale that keeps each layer's output as large as its input; queries and keys are wider, so that
    attention prefers some tokens and a lossy cache shows.

    Args:
        device: where the weights are drawn; another device draws others.
        seed: of the weights.
        dtype: of the weights, float32 or bfloat16.
        changes: fields of config.json that differ from the 8B shape.
    """
    fields = {**LLAMA_8B, **changes}
    config = parse_config(fields)
    generator = torch.Generator(device).manual_seed(seed)

    def noise(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        # One tensor at a time in its own dtype: 16 GB of weights never exist twice.
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(
            0.0, gain * columns**-0.5, generator=generator
        )

    def norm() -> Tensor:
        return torch.empty(config.hidden_size, dtype=dtype, device=device).normal_(1.0, 0.1, generator=generator)

    hidden, inner, q_size = config.hidden_size, config.intermediate_size, config.q_heads * config.head_dim
    kv_size = config.kv_heads * config.head_dim

    def qkv() -> Tensor:
        weight = noise(config.qkv_size, hidden)
        weight[: q_size + kv_size] *= QK_GAIN
        return weight

    layers = tuple(
        LayerWeights(
            input_norm=norm(), qkv=qkv(), qkv_bias=None, q_norm=None, k_norm=None,
            out=noise(hidden, q_size), out_bias=None,
            post_norm=norm(), gate_up=noise(2 * inner, hidden), gate_up_bias=None,
            down=noise(hidden, inner), down_bias=None,
        )
        for _ in range(config.layers)
    )  # fmt: skip
    embedding = noise(config.vocab_size, hidden, gain=hidden**0.5)
    weights = ModelWeights(embedding, layers, norm(), noise(config.vocab_size, hidden, gain=2.0))
    cos, sin = rope_tables(config.rope, config.max_positions)
    return CausalLM(config, weights, cos.to(device), sin.to(device))


def with_qk_norm(model: CausalLM, seed: int = 0) -> CausalLM:
    """The same model, sharing its weights, with an RMSNorm on each q and k head, as Qwen3 has it.

    Args:
        model: one of `random_llama`.
        seed: of the norms' weights.
    """
    w, generator = model.weights, torch.Generator(model.device).manual_seed(seed)

    def head_norm() -> Tensor:
        weight = torch.empty(model.config.head_dim, dtype=model.dtype, device=model.device)
        return weight.normal_(QK_GAIN, 0.1, generator=generator)

    layers = tuple(layer._replace(q_norm=head_norm(), k_norm=head_norm()) for layer in w.layers)
    return CausalLM(replace(model.config, qk_norm=True), w._replace(layers=layers), model.cos, model.sin)
