# SPDX-License-Identifier: Apache-2.0
"""vericache: drafts from a compressed KV cache, verifies with the full one, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vericache.config import EngineConfig, SamplingParams
    from vericache.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

_HOME = {"LLM": "vericache.llm", "EngineConfig": "vericache.config", "SamplingParams": "vericache.config"}


def __getattr__(name: str) -> Any:
    # Lazy: `import vericache` stays light, and torch is loaded by what needs it.
    if name not in _HOME:
        raise AttributeError(f"module 'vericache' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
