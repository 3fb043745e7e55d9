# SPDX-License-Identifier: Apache-2.0
"""The kernels, typed: thin wrappers of torch.ops.vericache.

T is the storage type, float32 or bfloat16, the same for all of a call's floating-point tensors unless said otherwise.
Page layouts are those of csrc/common/params.h: a full page is T [2, kv_heads, page_size, head_dim] (K, then V), a head
page T [2, page_size, head_dim], and a table holds their addresses as int64. Rows of one request are consecutive:
request r owns rows row_offsets[r] .. row_offsets[r + 1] - 1, and rows past row_offsets[-1] are idle (output zero).
Every op raises KernelError, before any work, for a wrong dtype, shape, device or value; addresses are trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from vericache import _C
except ImportError as error:
    raise ImportError(
        "vericache's compiled module vericache._C cannot be loaded; build it with "
        f"`pip install --no-build-isolation .` against the torch that is installed ({torch.__version__}): {error}"
    ) from error
from vericache import _fake  # noqa: F401  registers the fake kernels

_ops = torch.ops.vericache


def with_cuda() -> bool:
    """Whether this build carries the CUDA kernels."""
    return _C.with_cuda


def num_threads() -> int:
    """Threads the CPU kernels use."""
    return _C.num_threads()


def set_num_threads(threads: int) -> None:
    """Set the threads the CPU kernels use; no result depends on it.

    Args:
        threads: at least 1.

    Raises:
        KernelError: threads < 1.
    """
    _C.set_num_threads(threads)


def paged_attention(
    q: Tensor,
    page_table: Tensor,
    row_offsets: Tensor,
    row_position: Tensor,
    *,
    kv_heads: int,
    page_size: int,
    scale: float,
    window: int = 0,
    settled: bool = False,
) -> Tensor:
    """Full and verify attention over full pages; a row's bits depend on its q, position and K/V alone (R1).

    Args:
        q (T) [rows, q_heads, head_dim]: rotated queries.
        page_table (int64) [requests, max_pages]: addresses of full pages; those past a request's last are not read.
        row_offsets (int32) [requests + 1]: first row of each request.
        row_position (int32) [rows]: absolute position; the row attends to keys 0 .. position.
        kv_heads: KV heads; divides q_heads.
        page_size: tokens a page.
        scale: factor of the scores, usually head_dim ** -0.5.
        window: 0 for all keys, w for the last w (position included).
        settled: true promises that no op of this package still running or queued on the stream writes the
            tables, lengths and positions, or any of the cache but the rows' own positions; those may be written
            by `rope_write` or `linear_rope_write` just before. Reading then overlaps its end on a GPU. Speed only;
            false is always right.

    Returns:
        T [rows, q_heads, head_dim].
    """
    return _ops.paged_attention(
        q, page_table, row_offsets, row_position, kv_heads, page_size, scale, window, settled
    )


def kept_attention(
    q: Tensor,
    kept_table: Tensor,
    kept_len: Tensor,
    tail_table: Tensor,
    tail_start: Tensor,
    row_offsets: Tensor,
    row_position: Tensor,
    *,
    page_size: int,
    scale: float,
    settled: bool = False,
    as_full: bool = False,
) -> Tensor:
    """Draft attention over each head's kept tokens, then the full-precision tail.

    Args:
        q (T) [rows, q_heads, head_dim]: rotated queries.
        kept_table (int64) [requests, kv_heads, max_kept_pages]: addresses of head pages.
        kept_len (int32) [requests, kv_heads]: kept rows of each head, 0 allowed.
        tail_table (int64) [requests, max_tail_pages]: addresses of full pages; entry 0 holds position tail_start.
        tail_start (int32) [requests]: first position of the tail, a multiple of page_size.
        row_offsets (int32) [requests + 1]: first row of each request.
        row_position (int32) [rows]: the row attends to all kept rows and to tail_start .. position.
        page_size: tokens a page, of head and full pages alike.
        scale: factor of the scores.
        settled: as for `paged_attention`.
        as_full: true asks for the bits of `paged_attention` where no head of the batch has dropped a token and tails
            begin at multiples of 64, so that such a draft is never refused. Slower for few requests on a GPU.

    Returns:
        T [rows, q_heads, head_dim].
    """
    return _ops.kept_attention(
        q, kept_table, kept_len, tail_table, tail_start, row_offsets, row_position, page_size, scale, settled, as_full
    )


def quant_attention(
    q: Tensor,
    quant_table: Tensor,
    quant_len: Tensor,
    tail_table: Tensor,
    row_offsets: Tensor,
    row_position: Tensor,
    *,
    kv_heads: int,
    page_size: int,
    bits: int,
    group: int,
    scale: float,
    settled: bool = False,
) -> Tensor:
    """Draft attention over a quantized cache, then the full-precision tail.

    Args:
        q (T) [rows, q_heads, head_dim]: rotated queries.
        quant_table (int64) [requests, max_quant_pages]: addresses of quantized pages (`QuantPageLayout`).
        quant_len (int32) [requests]: quantized positions, a multiple of page_size; the tail starts there.
        tail_table (int64) [requests, max_tail_pages]: addresses of full pages; entry 0 holds position quant_len.
        row_offsets (int32) [requests + 1]: first row of each request.
        row_position (int32) [rows]: the row attends to 0 .. position.
        kv_heads: KV heads; divides q_heads.
        page_size: tokens a page.
        bits: 2, 4, 5, 6, 7 or 8.
        group: tokens a K group and channels a V group; divides page_size and head_dim.
        scale: factor of the scores.
        settled: as for `paged_attention`.

    Returns:
        T [rows, q_heads, head_dim].
    """
    return _ops.quant_attention(
        q, quant_table, quant_len, tail_table, row_offsets, row_position,
        kv_heads, page_size, bits, group, scale, settled,
    )  # fmt: skip


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_float32: bool = False,
    weight_settled: bool = False,
) -> Tensor:
    """x @ w^T (+ bias) (+ residual), float32 inside, rounded once; the K sum's order depends on (N, K) alone (R1).

    Args:
        x (T) [rows, k]: rows may be strided.
        w (T) [n, k]: contiguous.
        bias (T) [n]: or None.
        residual (T) [rows, n]: or None; rows may be strided.
        out_float32: return float32 whatever T is.
        weight_settled: True promises that no op of this package still running or queued on the stream writes w, as
            with a model's weights; on CUDA, reading w may then start before the op in front has ended. The result is
            the same.

    Returns:
        T or float32 [rows, n].
    """
    return _ops.linear(x, w, bias, residual, out_float32, weight_settled)


def linear_swiglu(x: Tensor, w: Tensor, bias: Tensor | None = None, *, weight_settled: bool = False) -> Tensor:
    """silu(gate) * up of gate, up = x @ w^T (+ bias): bit for bit `silu_mul(linear(x, w, bias))`, in one op.

    Args:
        x (T) [rows, k]: rows may be strided.
        w (T) [2 * dim, k]: gate, then up; contiguous.
        bias (T) [2 * dim]: or None.
        weight_settled: as in `linear`.

    Returns:
        T [rows, dim].
    """
    return _ops.linear_swiglu(x, w, bias, weight_settled)


def linear_rope_write(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    row_position: Tensor,
    row_page: Tensor,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    eps: float,
    weight_settled: bool = False,
) -> Tensor:
    """`rope_write` of x @ w^T (+ bias): bit for bit `rope_write(linear(x, w, bias), ...)`, in one op.

    Args:
        x (T) [rows, k]: rows may be strided.
        w (T) [(q_heads + 2 * kv_heads) * head_dim, k]: all q heads, all k heads, all v heads; contiguous.
        bias (T) [(q_heads + 2 * kv_heads) * head_dim]: or None.
        q_norm, k_norm, cos, sin, row_position, row_page, eps: as in `rope_write`.
        q_heads, kv_heads, head_dim, page_size: sizes.
        weight_settled: as in `linear`.

    Returns:
        T [rows, q_heads, head_dim]: rotated queries.
    """
    return _ops.linear_rope_write(
        x, w, bias, q_norm, k_norm, cos, sin, row_position, row_page, q_heads, kv_heads, head_dim, page_size, eps,
        weight_settled,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, rounded once.

    Args:
        x (T) [rows, dim]: rows may be strided.
        weight (T) [dim]: contiguous.
        eps: added to the mean square.

    Returns:
        T [rows, dim].
    """
    return _ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and x + residual itself (rounded to T before the norm).

    Args:
        x (T) [rows, dim]: rows may be strided.
        residual (T) [rows, dim]: rows may be strided.
        weight (T) [dim]: contiguous.
        eps: added to the mean square.

    Returns:
        T [rows, dim] the norm, and T [rows, dim] the new residual stream.
    """
    return _ops.add_rms_norm(x, residual, weight, eps)


def rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    row_position: Tensor,
    row_page: Tensor,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    eps: float,
) -> Tensor:
    """Per-head QK-norm (optional), rotary embedding (half-split), and the write of K and V into their page.

    Args:
        qkv (T) [rows, (q_heads + 2 * kv_heads) * head_dim]: all q heads, all k heads, all v heads.
        q_norm, k_norm (T) [head_dim]: RMSNorm weights of each head, or None.
        cos, sin (float32) [max_positions, head_dim / 2]: of the rotation angles, any scaling applied.
        row_position (int32) [rows]: absolute positions; on the CPU, checked against max_positions.
        row_page (int64) [rows]: address of the full page that holds the position; 0: K and V are not written.
        q_heads, kv_heads, head_dim, page_size: sizes.
        eps: of the QK-norm.

    Returns:
        T [rows, q_heads, head_dim]: rotated queries.
    """
    return _ops.rope_write(
        qkv, q_norm, k_norm, cos, sin, row_position, row_page, q_heads, kv_heads, head_dim, page_size, eps
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, rounded once.

    Args:
        gate_up (T) [rows, 2 * dim]: gate, then up; rows may be strided.

    Returns:
        T [rows, dim].
    """
    return _ops.silu_mul(gate_up)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    row_position: Tensor,
) -> tuple[Tensor, Tensor]:
    """argmax(filter(logits / temperature) + gumbel(seed, position)): a pure function of its arguments (R4).

    Filters apply in the order top_k, top_p (on the softmax of what top_k left), min_p, and keep tokens by value
    descending, then index ascending. Temperature 0 is the plain argmax. Ties go to the lowest index.

    Args:
        logits (float32) [rows, vocab]: rows may be strided.
        temperature (float32) [rows]: finite, >= 0.
        top_k (int32) [rows]: 0 for off.
        top_p (float32) [rows]: in (0, 1], 1 for off.
        min_p (float32) [rows]: in [0, 1], 0 for off.
        seed (int64) [rows]: any.
        row_position (int32) [rows]: absolute position of the token being drawn, >= 0.

    Returns:
        int64 [rows]: the token, -1 where the row has no softmax (a NaN, a +infinity, or -infinity alone); float32
        [rows]: its log-probability under the softmax of the unfiltered logits at temperature 1.

    Raises:
        KernelError: also for a parameter out of its range, on the CPU.
    """
    return _ops.sample(logits, temperature, top_k, top_p, min_p, seed, row_position)


def window_scores(queries: Tensor, k: Tensor) -> Tensor:
    """Averages the attention that the last queries of a sequence pay to its keys.

    The softmax is causal, scaled by head_dim ** -0.5, and in float32. No matrix of scores is made: K is read twice.
    The result depends on its arguments' values and shapes (on CUDA also on whether rows lie at multiples of 16 bytes,
    which another kernel takes) and is the same on every run.

    Args:
        queries (T) [window, q_heads, head_dim]: rotated queries of positions tokens - window .. tokens - 1; rows and
            heads may be strided.
        k (T) [kv_heads, tokens, head_dim]: rotated keys; q_heads is a multiple of kv_heads; heads and tokens may be
            strided. On CUDA, bfloat16 with head_dim 64 or 128 and every row at a multiple of 16 bytes is fast.

    Returns:
        float32 [q_heads, tokens]: mean over the window; keys in a query's future count as 0.

    Raises:
        KernelError: also for a window of no queries or of more than `tokens`, and for a head_dim above 256.
    """
    return _ops.window_scores(queries, k)


def kv_quantize(
    full_pages: Tensor,
    quant_pages: Tensor,
    like: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    bits: int,
    group: int,
) -> None:
    """Quantize full pages into quantized pages: keys per channel, values per token (KIVI, arXiv 2402.02750).

    Args:
        full_pages (int64) [pages]: addresses read.
        quant_pages (int64) [pages]: addresses written.
        like (T) [any]: gives T and the device; may be empty.
        kv_heads, head_dim, page_size: sizes.
        bits: 2, 4, 5, 6, 7 or 8.
        group: tokens a K group and channels a V group; divides page_size and head_dim.
    """
    _ops.kv_quantize(full_pages, quant_pages, like, kv_heads, head_dim, page_size, bits, group)


def kv_dequantize(
    full_pages: Tensor,
    quant_pages: Tensor,
    like: Tensor,
    *,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    bits: int,
    group: int,
) -> None:
    """The reverse of `kv_quantize`: quant_pages is read, full_pages written; arguments as there."""
    _ops.kv_dequantize(full_pages, quant_pages, like, kv_heads, head_dim, page_size, bits, group)


def gather_tokens(
    page_table: Tensor,
    head_table: Tensor,
    positions: Tensor,
    counts: Tensor,
    like: Tensor,
    *,
    head_dim: int,
    page_size: int,
) -> None:
    """Copy tokens of one request and layer out of full pages: head page row i of head h := position positions[h, i].

    Args:
        page_table (int64) [max_pages]: addresses of full pages, read.
        head_table (int64) [kv_heads, max_head_pages]: addresses of head pages, written.
        positions (int32) [kv_heads, capacity]: absolute positions.
        counts (int32) [kv_heads]: rows of each head.
        like (T) [any]: gives T and the device; may be empty.
        head_dim, page_size: sizes.
    """
    _ops.gather_tokens(page_table, head_table, positions, counts, like, head_dim, page_size)


def scatter_tokens(
    page_table: Tensor,
    head_table: Tensor,
    positions: Tensor,
    counts: Tensor,
    like: Tensor,
    *,
    head_dim: int,
    page_size: int,
) -> None:
    """The reverse of `gather_tokens`: head pages are read, full pages written; arguments as there."""
    _ops.scatter_tokens(page_table, head_table, positions, counts, like, head_dim, page_size)


def bf16_packed_bound(elems: int) -> int:
    """Bytes that a page of `elems` bfloat16 values may pack to, whatever they are: about 16.03 bits a value."""
    return _C.bf16_packed_bound(elems)


def bf16_pack(raw_pages: Tensor, packed_pages: Tensor, like: Tensor, *, elems: int, room: int) -> Tensor:
    """Pack pages of bfloat16 without loss, NaN payloads, infinities and subnormals included.

    Keys and values take about 12 bits instead of 16 (`Bf16PackLayout` in csrc/common/params.h). The bytes are the same
    on the CPU and on CUDA.

    Args:
        raw_pages (int64) [pages]: addresses read, `elems` values each.
        packed_pages (int64) [pages]: addresses written; on CUDA device or pinned host memory. Both kinds of address are
            multiples of 16; unpacking over the link is faster where these are multiples of 128.
        like (bfloat16) [any]: gives the device; may be empty.
        elems: values a page, a multiple of 8.
        room: bytes at each packed page, at least `bf16_packed_bound(elems)`.

    Returns:
        (int64) [pages]: bytes in use of each packed page, a multiple of 16. The rest of its room may be cut off.
    """
    return _ops.bf16_pack(raw_pages, packed_pages, like, elems, room)


def bf16_unpack(
    packed_pages: Tensor,
    packed_bytes: Tensor,
    raw_pages: Tensor,
    like: Tensor,
    *,
    elems: int,
    max_blocks: int = 0,
) -> None:
    """The reverse of `bf16_pack`, bit for bit.

    On the CPU a packed page that is damaged or of another size is refused; on CUDA its contents are trusted, as
    addresses are.

    Args:
        packed_pages (int64) [pages]: addresses read; on CUDA device or pinned host memory.
        packed_bytes (int64) [pages]: bytes in use of each, from `bf16_pack`.
        raw_pages (int64) [pages]: addresses written, `elems` values each.
        like (bfloat16) [any]: gives the device; may be empty.
        elems: values a page, as they were packed.
        max_blocks: thread blocks at most on CUDA, to leave room beside a transfer; 0: fill the device.
    """
    _ops.bf16_unpack(packed_pages, packed_bytes, raw_pages, like, elems, max_blocks)
