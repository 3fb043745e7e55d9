# SPDX-License-Identifier: Apache-2.0
"""Rotary tables against transformers' own, and the rule that settles dynamic scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vericache.errors import UnsupportedModelError
from vericache.models.config import parse_config
from vericache.models.rope import rope_tables

# Published settings, in the old spelling and in the new one.
LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: list[dict[str, Any]] = [
    {"rope_theta": 500000.0},
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA31}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA31}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.5}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
     "rope_theta": 1000000.0},
    {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "attention_factor": 1.25,
                         "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 512}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 10000.0, "mscale": 0.707,
                         "mscale_all_dim": 1.0, "truncate": False, "original_max_position_embeddings": 512}},
]  # fmt: skip


def config_fields(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        **fields,
    }


def their_tables(fields: dict[str, Any], folder: Path, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    (folder / "config.json").write_text(json.dumps(fields))
    embedding = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    cos, sin = embedding(torch.zeros(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: json.dumps(scaling)[:60])
def test_tables_equal_transformers(scaling: dict[str, Any], tmp_path: Path) -> None:
    """Same formula in the same precision: not a bit of difference."""
    fields = config_fields(**scaling)
    cos, sin = rope_tables(parse_config(fields).rope, 1024)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1024, 32)
    their_cos, their_sin = their_tables(fields, tmp_path, 1024)
    assert torch.equal(cos, their_cos)
    assert torch.equal(sin, their_sin)


def test_dynamic_is_fixed_for_the_loaded_length(tmp_path: Path) -> None:
    """Loaded for more positions, the base is that of the whole length, for all positions."""
    fields = config_fields(rope_scaling={"type": "dynamic", "factor": 2.0})
    rope = parse_config(fields).rope
    assert rope.default_positions == 1024 and rope.position_limit == 2048
    extended, _ = rope_tables(rope, 2048)
    plain, _ = rope_tables(rope, 1024)
    shorter, _ = rope_tables(rope, 100)
    assert torch.equal(shorter, plain[:100]), "within the trained length the base is not scaled"
    assert not torch.equal(extended[:1024], plain), "past it, one base serves all positions"
    theirs, _ = their_tables(fields, tmp_path, 2048)
    assert torch.equal(extended, theirs), "the base transformers uses for one pass over the whole length"


def test_yarn_reaches_its_extended_length() -> None:
    """YaRN files leave max_position_embeddings at the trained length; linear ones mean it as it is."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert parse_config(config_fields(rope_scaling=yarn)).max_positions == 4096
    assert parse_config(config_fields(rope_scaling={"type": "linear", "factor": 4.0})).max_positions == 1024


@pytest.mark.parametrize(("positions", "kind"), [(0, "default"), (1025, "default"), (2049, "dynamic")])
def test_positions_out_of_reach(positions: int, kind: str) -> None:
    scaling = {} if kind == "default" else {"rope_scaling": {"type": kind, "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match=f"{positions} positions were asked for.*serves 1 to"):
        rope_tables(parse_config(config_fields(**scaling)).rope, positions)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "longrope", "short_factor": [], "long_factor": []}, "'longrope'.*not supported.*yarn"),
        ({"rope_type": "su"}, "'su'.*not supported"),
        ({"type": "linear"}, "factor of rope_scaling is None"),
        ({"type": "linear", "factor": 0.5}, "factor of rope_scaling is 0.5"),
        ({"type": "linear", "factor": "4"}, "factor of rope_scaling is '4'"),
        ({"type": "linear", "factor": float("nan")}, "factor of rope_scaling is nan"),
        ({"type": "yarn", "factor": 4.0, "mrope_section": [1]}, "'mrope_section', which is not supported"),
        ({**LLAMA31, "type": "llama3", "high_freq_factor": 1.0}, "must be above low_freq_factor"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ([1], "not an object"),
    ],
)
def test_refused_by_name(scaling: Any, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        parse_config(config_fields(rope_scaling=scaling))
