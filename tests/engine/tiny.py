# SPDX-License-Identifier: Apache-2.0
"""Tiny random models for the engine's tests: fast enough for hundreds of runs, varied enough to disagree."""

from __future__ import annotations

from functools import cache

import torch

from vericache.models.config import parse_config
from vericache.models.llama import CausalLM, LayerWeights, ModelWeights
from vericache.models.rope import rope_tables

VOCAB = 61
POSITIONS = 320


@cache
def tiny_model(dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: str = "cpu", head_dim: int = 32) -> CausalLM:
    """Three layers, 8 query and 2 KV heads, random weights wide enough that greedy text keeps changing."""
    hidden, heads, kv_heads, dim, inner, layers = 64, 8, 2, head_dim, 96, 3
    config = parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
        }
    )
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 0.25) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(hidden, generator=generator)).to(dtype).to(device)

    blocks = tuple(
        LayerWeights(
            norm(),
            noise((heads + 2 * kv_heads) * dim, hidden),
            None,
            None,
            None,
            noise(hidden, heads * dim),
            None,
            norm(),
            noise(2 * inner, hidden),
            None,
            noise(hidden, inner),
            None,
        )
        for _ in range(layers)
    )
    weights = ModelWeights(noise(VOCAB, hidden, scale=1.0), blocks, norm(), noise(VOCAB, hidden))
    cos, sin = rope_tables(config.rope, POSITIONS)
    return CausalLM(config, weights, cos.to(device), sin.to(device))
