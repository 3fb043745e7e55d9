# SPDX-License-Identifier: Apache-2.0
"""Models: configuration, checkpoints, the forward pass and the tokenizer. Where KV lies is not known here."""

from vericache.models.checkpoint import find_model, list_models, load_model
from vericache.models.config import ModelConfig, load_config
from vericache.models.interface import KVView, RowSpan
from vericache.models.llama import CausalLM
from vericache.models.tokenizer import Detokenizer, Tokenizer, load_tokenizer

__all__ = [
    "CausalLM",
    "Detokenizer",
    "KVView",
    "ModelConfig",
    "RowSpan",
    "Tokenizer",
    "find_model",
    "list_models",
    "load_config",
    "load_model",
    "load_tokenizer",
]
