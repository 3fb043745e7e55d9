# SPDX-License-Identifier: Apache-2.0
"""cuBLAS at the shapes of dense_bench, timed the same way: graph replays, weights rotated past the L2.

python -m bench.gpu.cublas_baseline [results.json]
"""

import json
import sys
from pathlib import Path

import torch

from bench._timing import graph_us

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
ROWS = [1, 8, 16, 32, 64, 128, 256, 512]
PAST_L2 = 400 << 20  # bytes that one rotation walks over, at least


def time_us(rows: int, n: int, k: int) -> float:
    """Median time of one x @ w^T in microseconds."""
    sets = max(2, -(-PAST_L2 // (n * k * 2)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(sets)]
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
    return graph_us(lambda i: torch.matmul(x, weights[i % sets].t(), out=out), max(sets, 12))


def main() -> None:
    results = []
    for n, k in SHAPES:
        for rows in ROWS:
            us = time_us(rows, n, k)
            results.append({"name": f"cublas M={rows} N={n} K={k}", "us": us, "gb_s": n * k * 2 / us * 1e-3})
            print(f"cublas M={rows:<4} N={n:<7} K={k:<6} {us:9.2f} us  {n * k * 2 / us * 1e-3:7.1f} GB/s", flush=True)
    if len(sys.argv) > 1:
        header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        Path(sys.argv[1]).write_text(json.dumps({**header, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
