# SPDX-License-Identifier: Apache-2.0
"""How many kernels a decoder layer launches in decode, and that all of them are ours."""

from __future__ import annotations

import pytest
import torch

from bench.decode_step import PAGE_SIZE, Case, Pool, Shape
from bench.kernel_trace import kernels_of
from bench.random_model import random_llama, with_qk_norm

pytestmark = pytest.mark.cuda

LAUNCHES = 8  # norm, qkv with rope_write, attention with its merge, o, norm, gate_up with SwiGLU, down


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("requests", "tokens"), [(8, 8192), (1, 32768)])
@torch.inference_mode()
def test_launches_of_a_layer(requests: int, tokens: int, qk_norm: bool) -> None:
    model = random_llama("cuda", num_hidden_layers=2, vocab_size=512)
    if qk_norm:
        model = with_qk_norm(model)
    pool = Pool(model, requests * tokens // PAGE_SIZE, torch.Generator("cuda").manual_seed(1))
    shape = Shape("decode", tokens, (1,) * requests)
    step = Case(model, pool, shape, torch.Generator("cuda").manual_seed(2)).step()
    layer = kernels_of(lambda: step.layers(2), minus=lambda: step.layers(1))
    names = [kernel.name for kernel in layer for _ in range(kernel.count)]
    assert 0 < len(names) <= LAUNCHES, names
    assert not [name for name in names if name.startswith(("at::", "Mem", "cub", "cutlass"))], names
