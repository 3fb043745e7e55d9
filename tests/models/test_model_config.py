# SPDX-License-Identifier: Apache-2.0
"""config.json: what is read, what is defaulted, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vericache.errors import CheckpointError, UnsupportedModelError
from vericache.models.config import load_config, parse_config


def fields(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    values = {
        "architectures": [architecture],
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        **changes,
    }
    return {name: value for name, value in values.items() if value != "absent"}


def test_llama_defaults() -> None:
    config = parse_config(fields(num_key_value_heads="absent"))
    assert (config.q_heads, config.kv_heads, config.group, config.head_dim) == (8, 8, 1, 32)
    assert config.windows == (0, 0, 0, 0) and not config.has_sliding_window
    assert not (config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm or config.tied)
    assert config.rope.theta == 10000.0 and config.rms_norm_eps == 1e-6 and config.max_positions == 1024
    assert config.dtype == torch.float32 and config.eos_token_ids == () and config.bos_token_id is None
    assert config.softmax_scale == 32**-0.5 and config.qkv_size == 24 * 32


def test_what_the_architectures_add() -> None:
    qwen2 = parse_config(fields("Qwen2ForCausalLM"))
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm
    qwen3 = parse_config(fields("Qwen3ForCausalLM", attention_bias=True))
    assert qwen3.qkv_bias and qwen3.o_bias and qwen3.qk_norm and qwen3.head_dim == 128
    llama = parse_config(fields(attention_bias=True, mlp_bias=True, head_dim=64, tie_word_embeddings=True))
    assert llama.qkv_bias and llama.o_bias and llama.mlp_bias and llama.head_dim == 64 and llama.tied


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (fields("MistralForCausalLM"), (4096,) * 4),  # transformers' default
        (fields("MistralForCausalLM", sliding_window=None), (0,) * 4),
        (fields("MistralForCausalLM", sliding_window=7), (7,) * 4),
        (fields("Qwen2ForCausalLM", sliding_window=7, max_window_layers=2), (0,) * 4),
        (fields("Qwen2ForCausalLM", sliding_window=7, max_window_layers=2, use_sliding_window=True),
         (0, 0, 7, 7)),
        (fields("Qwen3ForCausalLM", sliding_window=7, max_window_layers=0, use_sliding_window=True),
         (7, 7, 7, 7)),
        (fields("Qwen3ForCausalLM", sliding_window=7, use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"] * 2), (7, 0, 7, 0)),
    ],
)  # fmt: skip
def test_windows(values: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert parse_config(values).windows == windows


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)],
)
def test_dtype(name: str, dtype: torch.dtype) -> None:
    assert parse_config(fields(torch_dtype=name)).dtype == dtype
    assert parse_config(fields(dtype=name)).dtype == dtype


def test_end_tokens() -> None:
    """generation_config.json wins; one id or several, each once."""
    assert parse_config(fields(eos_token_id=5)).eos_token_ids == (5,)
    assert parse_config(fields(eos_token_id=5), {"eos_token_id": [7, 8, 7]}).eos_token_ids == (7, 8)
    assert parse_config(fields(eos_token_id=0), {"eos_token_id": None}).eos_token_ids == (0,)


REFUSED = [
    (fields("GPT2LMHeadModel"), "'GPT2LMHeadModel' is not supported; LlamaForCausalLM, MistralForCausalLM"),
    (fields(architectures="absent"), "architectures is None"),
    (fields(architectures=["LlamaForCausalLM", "MistralForCausalLM"]), "exactly one of"),
    (fields(hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu'"),
    (fields(quantization_config={"quant_method": "awq"}), "quantization_config \\('awq'\\)"),
    (fields(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (fields(rope_interleaved=True), "rope_interleaved is set"),
    (fields("MistralForCausalLM", attention_bias=True), "attention_bias is set.*not for MistralForCausalLM"),
    (fields("Qwen3ForCausalLM", mlp_bias=True), "mlp_bias is set.*not for Qwen3ForCausalLM"),
    (fields(num_key_value_heads=3), "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
    (fields("Qwen2ForCausalLM", num_key_value_heads="absent"), "lacks the field 'num_key_value_heads'"),
    (fields(num_hidden_layers=0), "num_hidden_layers is 0, not an integer of at least 1"),
    (fields(vocab_size="many"), "vocab_size is 'many'"),
    (fields(hidden_size=True), "hidden_size is True"),
    (fields(hidden_size=250), "hidden_size = 250 is not a multiple of num_attention_heads"),
    (fields(head_dim=33), "head_dim is 33; multiples of 16 from 32 to 256"),
    (fields(head_dim=16), "head_dim is 16"),
    (fields(head_dim=272), "head_dim is 272"),
    (fields(rms_norm_eps=0), "rms_norm_eps is 0"),
    (fields(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', not true or false"),
    (fields(max_position_embeddings=None), "max_position_embeddings is None"),
    (fields(sliding_window=128), "sliding_window is set, but LlamaForCausalLM has none"),
    (fields(torch_dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn' is not supported"),
    (fields(eos_token_id="end"), "eos_token_id is"),
    (fields("Qwen3ForCausalLM", layer_types=["full_attention"]), "one kind for each of the 4 layers"),
    (fields("Qwen3ForCausalLM", layer_types=["full_attention"] * 3 + ["linear"]), "holds 'linear'"),
    (fields("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 4), "no sliding_window is on"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list, not an object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields(eos_token_id=3)))
    assert load_config(tmp_path).eos_token_ids == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert load_config(tmp_path).eos_token_ids == (4, 5)
