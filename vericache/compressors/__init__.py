# SPDX-License-Identifier: Apache-2.0
"""Compressors: one small file a method. They see tensors and nothing else."""

from vericache.compressors.interface import (
    Compressor,
    Evidence,
    KeptTokens,
    LayerEvidence,
    QuantizedTokens,
)
from vericache.compressors.registry import METHODS, Method, check_supported, parse_compressor, spec_of

__all__ = [
    "METHODS",
    "Compressor",
    "Evidence",
    "KeptTokens",
    "LayerEvidence",
    "Method",
    "QuantizedTokens",
    "check_supported",
    "parse_compressor",
    "spec_of",
]
