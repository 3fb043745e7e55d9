# SPDX-License-Identifier: Apache-2.0
"""The compiled module: loading it registers torch.ops.vericache."""

with_cuda: bool

def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
