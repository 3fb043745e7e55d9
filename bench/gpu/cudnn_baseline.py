# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention at the shapes of attention_bench, timed the same way: graph replays, K and V rotated past the L2.

python -m bench.gpu.cudnn_baseline [results.json]
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench._timing import graph_us

SHAPES = [(8, 4096), (8, 32768), (1, 32768), (1, 131072), (8, 131072)]
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAST_L2 = 1 << 30  # bytes that one rotation walks over, at least
GRAPH_BYTES = 4 << 30  # that calls of a graph read, at least, and
PAUSE_S = 0.2  # before each timing: as in attention_bench.cu


def kv_bytes(batch: int, tokens: int) -> int:
    """Bytes of K and V in bfloat16."""
    return 4 * batch * KV_HEADS * tokens * HEAD_DIM


def time_us(batch: int, tokens: int, rows: int) -> float:
    """Median time of one call in microseconds; `rows` query rows a request, without a causal mask among them."""
    sets = max(1, -(-PAST_L2 // kv_bytes(batch, tokens)))
    shape = (batch, KV_HEADS, tokens, HEAD_DIM)
    keys = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    values = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    q = torch.randn(batch, Q_HEADS, rows, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def work(i: int) -> None:
        scaled_dot_product_attention(q, keys[i % sets], values[i % sets], enable_gqa=True)

    launches = max(4, GRAPH_BYTES // kv_bytes(batch, tokens) + 1)
    time.sleep(PAUSE_S)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.inference_mode():
        return graph_us(work, launches)


def main() -> None:
    results = []
    for batch, tokens in SHAPES:
        for rows in (1, 32) if tokens == 32768 else (1,):
            us = time_us(batch, tokens, rows)
            size = kv_bytes(batch, tokens)
            name = f"cudnn {rows} rows {batch}x{tokens // 1024}K"
            results.append({"name": name, "us": us, "gb_s": size / us * 1e-3})
            print(f"{name:<24} {us:9.2f} us  {size / us * 1e-3:7.1f} GB/s", flush=True)
            torch.cuda.empty_cache()
    if len(sys.argv) > 1:
        header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        Path(sys.argv[1]).write_text(json.dumps({**header, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
