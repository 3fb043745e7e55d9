# SPDX-License-Identifier: Apache-2.0
"""`ModelConfig`: the fields of a Hugging Face `config.json` that shape the computation, parsed and validated.

Where a field is absent, the default is the one `transformers` uses for that architecture, so that one file
means one model in both. A value that would change the computation in a way this package does not implement is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vericache.errors import UnsupportedModelError
from vericache.models.fields import Fields, read_json
from vericache.models.rope_config import RopeConfig, parse_rope

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    # There is no float16 storage: bfloat16 has the same size, and a float16 weight always lies in its range.
    "float16": torch.bfloat16,
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one checkpoint.

    Attributes:
        architecture: one of `SUPPORTED_ARCHITECTURES`.
        vocab_size, hidden_size, intermediate_size, layers: sizes.
        q_heads, kv_heads, head_dim: attention shape; `q_heads` is a multiple of `kv_heads`.
        max_positions: positions a request may use, prompt and generated tokens together.
        rms_norm_eps: epsilon of every RMSNorm.
        rope: rotary embedding, see `RopeConfig`.
        windows: one entry a layer; 0: full attention, w: the row sees keys position - w + 1 .. position.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm over head_dim on each q and k head before the rotation (Qwen3).
        tied: the lm_head is the embedding matrix.
        dtype: storage dtype the checkpoint asks for, float32 or bfloat16 (float16 is held as bfloat16).
        bos_token_id: token that starts a text, if the checkpoint names one.
        eos_token_ids: tokens that end a text; from generation_config.json, else config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def group(self) -> int:
        """Query heads a KV head (GQA)."""
        return self.q_heads // self.kv_heads

    @property
    def qkv_size(self) -> int:
        """Width of the fused q, k and v projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on q . k."""
        return self.head_dim**-0.5

    @property
    def has_sliding_window(self) -> bool:
        """Whether any layer sees less than the whole context."""
        return any(self.windows)


def load_config(folder: Path) -> ModelConfig:
    """Reads `config.json` and, where present, `generation_config.json`.

    Args:
        folder: a Hugging Face checkpoint folder.

    Raises:
        CheckpointError: config.json is missing or no JSON object.
        UnsupportedModelError: an architecture or a field value that is not implemented, by name.
    """
    values = read_json(folder / "config.json", needed=True)
    return parse_config(values, read_json(folder / "generation_config.json", needed=False))


def parse_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`ModelConfig` of a parsed config.json and generation_config.json.

    Raises:
        UnsupportedModelError: an architecture or a field value that is not implemented, by name.
    """
    fields = Fields(values, "config.json")
    architecture = _architecture(values)
    _refuse_unimplemented(values, architecture)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    if architecture == "LlamaForCausalLM" and not fields.has("num_key_value_heads"):
        kv_heads = heads
    else:
        kv_heads = fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads = {heads} is not a multiple of num_key_value_heads = "
            f"{kv_heads}."
        )
    head_dim = _head_dim(fields, architecture, hidden, heads)
    rope = parse_rope(values, head_dim)
    attention_bias = (
        fields.flag("attention_bias") if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") else False
    )
    qwen2 = architecture == "Qwen2ForCausalLM"
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", minimum=2),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        layers=layers,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=rope.default_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=_windows(fields, architecture, layers),
        qkv_bias=attention_bias or qwen2,
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") if architecture == "LlamaForCausalLM" else False,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=fields.flag("tie_word_embeddings"),
        dtype=_dtype(values),
        bos_token_id=values.get("bos_token_id") if isinstance(values.get("bos_token_id"), int) else None,
        eos_token_ids=_eos_ids(values, generation or {}),
    )


def _architecture(values: Mapping[str, Any]) -> str:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    names = values.get("architectures")
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedModelError(
            f"config.json: architectures is {names!r}; supported is exactly one of {supported}."
        )
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"config.json: the architecture {names[0]!r} is not supported; {supported} are."
        )
    return str(names[0])


def _refuse_unimplemented(values: Mapping[str, Any], architecture: str) -> None:
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"config.json: hidden_act is {activation!r}; only 'silu' is supported.")
    if values.get("quantization_config") is not None:
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, Mapping) else method
        raise UnsupportedModelError(
            f"config.json: quantization_config ({method!r}) is set; only unquantized float32, bfloat16 and "
            "float16 "
            "weights are supported."
        )
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"config.json: partial_rotary_factor is {values['partial_rotary_factor']!r}; only 1.0 is "
            "supported."
        )
    if values.get("rope_interleaved"):
        raise UnsupportedModelError(
            "config.json: rope_interleaved is set; only the half-split layout is supported."
        )
    # Fields another architecture implements: silently ignoring one would load a different model than was
    # trained.
    foreign = {"mlp_bias": ("LlamaForCausalLM",), "attention_bias": ("LlamaForCausalLM", "Qwen3ForCausalLM")}
    for name, owners in foreign.items():
        if values.get(name) and architecture not in owners:
            raise UnsupportedModelError(
                f"config.json: {name} is set, which is supported for {' and '.join(owners)}, not for "
                f"{architecture}."
            )


def _head_dim(fields: Fields, architecture: str, hidden: int, heads: int) -> int:
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim")
    elif architecture == "Qwen3ForCausalLM":
        head_dim = 128
    elif hidden % heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads} and "
            "head_dim is "
            "not given."
        )
    else:
        head_dim = hidden // heads
    if not 32 <= head_dim <= 256 or head_dim % 16:
        raise UnsupportedModelError(
            f"config.json: head_dim is {head_dim}; multiples of 16 from 32 to 256 are supported."
        )
    return head_dim


def _windows(fields: Fields, architecture: str, layers: int) -> tuple[int, ...]:
    if architecture == "LlamaForCausalLM":
        # Llama has no sliding window; `transformers` ignores the field, so a file that sets one is not what
        # it says.
        if fields.has("sliding_window"):
            raise UnsupportedModelError("config.json: sliding_window is set, but LlamaForCausalLM has none.")
        return (0,) * layers
    if architecture == "MistralForCausalLM":
        explicit_null = "sliding_window" in fields.values and fields.values["sliding_window"] is None
        window = 0 if explicit_null else fields.integer("sliding_window", 4096)
        if fields.has("layer_types"):
            raise UnsupportedModelError("config.json: layer_types is not supported for MistralForCausalLM.")
        return (window,) * layers
    use_window = fields.flag("use_sliding_window")
    # A null sliding_window means none, as does use_sliding_window = false.
    null_window = "sliding_window" in fields.values and fields.values["sliding_window"] is None
    window = fields.integer("sliding_window", 4096) if use_window and not null_window else 0
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UnsupportedModelError(
            f"config.json: layer_types must list one kind for each of the {layers} layers."
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"config.json: layer_types holds {kind!r}; 'full_attention' and 'sliding_attention' are "
                "supported."
            )
        if kind == "sliding_attention" and window == 0:
            raise UnsupportedModelError(
                "config.json: layer_types holds 'sliding_attention' but no sliding_window is on."
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _dtype(values: Mapping[str, Any]) -> torch.dtype:
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name not in _TORCH_DTYPES:
        raise UnsupportedModelError(
            f"config.json: the dtype {name!r} is not supported; {', '.join(_TORCH_DTYPES)} are."
        )
    return _TORCH_DTYPES[name]


def _eos_ids(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    ids = values.get("eos_token_id") if ids is None else ids
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) for token in ids):
        raise UnsupportedModelError(f"eos_token_id is {ids!r}, not an integer or a list of integers.")
    return tuple(dict.fromkeys(ids))
