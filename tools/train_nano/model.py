# SPDX-License-Identifier: Apache-2.0
"""The Llama architecture with per-layer weights stacked, written for fast training of a small model.

Everything but attention works on flat rows [tokens, hidden], so that one compiled version serves every
(batch, length) with the same token count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class NanoConfig:
    """Shape of the model; the defaults are vericache-nano."""

    layers: int = 6
    hidden: int = 384
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 1024
    vocab: int = 4096
    positions: int = 17408
    rope_theta: float = 200000.0
    eps: float = 1e-5


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, computed in float32 as transformers does."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def rope_tables(config: NanoConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cos and sin (float32) [length, head_dim]."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] / config.rope_theta**half
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def before_attention(
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and rotation.

    Args:
        x [tokens, hidden]: residual stream.
        cos, sin [tokens, 1, head_dim]: rotation of each token's position.

    Returns:
        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim].
    """
    y = rms_norm(x, norm, eps)
    q, k, v = (F.linear(y, w.to(y.dtype)).unflatten(-1, (-1, head_dim)) for w in (wq, wk, wv))
    cos, sin = cos.to(y.dtype), sin.to(y.dtype)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def after_attention(
    x: Tensor, attended: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """Output projection and feed-forward part; x [tokens, hidden], attended [tokens, heads * head_dim]."""
    x = x + F.linear(attended, wo.to(x.dtype))
    y = rms_norm(x, norm, eps)
    y = F.silu(F.linear(y, gate.to(y.dtype))) * F.linear(y, up.to(y.dtype))
    return x + F.linear(y, down.to(y.dtype))


def weighted_loss(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns the weighted mean cross-entropy, and whether each token's top choice is right [tokens]."""
    logits = F.linear(rms_norm(x, norm, eps), embedding.to(x.dtype)).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum().clamp_min(1.0), logits.detach().argmax(-1) == targets


def attention(
    q: Tensor, k: Tensor, v: Tensor, rows: int, backend: SDPBackend | None, expand: bool = False
) -> Tensor:
    """Causal attention within each row; flat [tokens, heads, head_dim] in, [tokens, heads * head_dim] out.

    `expand` repeats k and v to the query heads, for backends that do not know groups.
    """
    q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (q, k, v))
    if expand:
        k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    if backend is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


class Nano(nn.Module):
    """The model.

    Args:
        config: its shape.
        compile_parts: compile the parts around attention (for a fixed token count).
    """

    MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")

    def __init__(self, config: NanoConfig, compile_parts: bool = False) -> None:
        super().__init__()
        self.config = config
        c, hidden = config, config.hidden
        q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def matrix(out: int, fan_in: int, gain: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(c.layers, out, fan_in) * gain / fan_in**0.5)

        self.embedding = nn.Parameter(torch.randn(c.vocab, hidden) * 0.02)
        self.norm1 = nn.Parameter(torch.ones(c.layers, hidden))
        self.norm2 = nn.Parameter(torch.ones(c.layers, hidden))
        self.norm_out = nn.Parameter(torch.ones(hidden))
        self.wq, self.wk, self.wv = (
            matrix(q_dim, hidden, 0.6),
            matrix(kv_dim, hidden, 0.6),
            matrix(kv_dim, hidden, 0.6),
        )
        self.wo = matrix(hidden, q_dim, 0.1)
        self.gate, self.up = matrix(c.intermediate, hidden, 0.6), matrix(c.intermediate, hidden, 0.6)
        self.down = matrix(hidden, c.intermediate, 0.1)
        self.backend: SDPBackend | None = None
        self.expand = False
        fast: Callable[..., Callable[..., object]] = (
            (lambda f: torch.compile(f, dynamic=False, fullgraph=True)) if compile_parts else (lambda f: f)
        )
        self._before, self._after, self._loss = map(fast, (before_attention, after_attention, weighted_loss))

    def hidden_states(self, ids: Tensor, dtype: torch.dtype, compiled: bool = False) -> Tensor:
        """Runs the layers.

        Args:
            ids (int64) [rows, length]: tokens.
            dtype: type of the residual stream and of the matrix products.
            compiled: use the compiled parts.

        Returns:
            The residual stream before the last norm [rows * length, hidden].
        """
        c = self.config
        rows, length = ids.shape
        before = self._before if compiled else before_attention
        after = self._after if compiled else after_attention
        cos, sin = (t.repeat(rows, 1)[:, None] for t in rope_tables(c, length, ids.device))
        x = F.embedding(ids.flatten(), self.embedding.to(dtype))
        names = ("norm1", "wq", "wk", "wv", "wo", "norm2", "gate", "up", "down")
        for n1, wq, wk, wv, wo, n2, gate, up, down in zip(
            *(getattr(self, name).unbind(0) for name in names), strict=True
        ):
            q, k, v = before(x, n1, wq, wk, wv, cos, sin, c.eps, c.head_dim)
            attended = attention(q, k, v, rows, self.backend, self.expand)
            x = after(x, attended, wo, n2, gate, up, down, c.eps)
        return x

    def loss(
        self, ids: Tensor, weights: Tensor, dtype: torch.dtype, compiled: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Next-token loss.

        Args:
            ids (int64) [rows, length]: tokens.
            weights (float32) [rows, length]: each token's weight as a target.

        Returns:
            The weighted mean loss, and whether each next token is right (bool) [rows * length]; the
            last entry of each row is meaningless.
        """
        x = self.hidden_states(ids, dtype, compiled)
        targets = ids.roll(-1, 1).flatten()
        weights = weights.roll(-1, 1)
        weights[:, -1] = 0
        head = self._loss if compiled else weighted_loss
        return head(x, self.norm_out, self.embedding, targets, weights.flatten(), self.config.eps)

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits [tokens, vocab] of residual rows [tokens, hidden]."""
        return F.linear(rms_norm(x, self.norm_out, self.config.eps), self.embedding.to(x.dtype))


def pick_backend(config: NanoConfig, tokens: int, length: int) -> tuple[SDPBackend | None, bool]:
    """Times the attention backends, forward and backward, and returns the fastest that is right.

    Returns:
        The backend, None where there is no GPU or no fused one works, and `expand` of `attention`.
    """
    if not torch.cuda.is_available():
        return None, False
    rows, best = max(1, tokens // length), (float("inf"), None, False)
    shape = (rows * length, config.heads, config.head_dim)
    kv_shape = (rows * length, config.kv_heads, config.head_dim)
    tensors = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in (shape, kv_shape, kv_shape)]
    reference: list[Tensor] | None = None
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    for backend, expand in ((b, e) for e in (True, False) for b in backends):
        try:
            times = []
            for _ in range(4):
                inputs = [t.detach().requires_grad_() for t in tensors]
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                out = attention(*inputs, rows, backend, expand)
                out.sin().sum().backward()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop))
            results = [out.detach(), *(t.grad for t in inputs)]
        except RuntimeError as error:
            print(f"attention: {backend.name} expand={expand} does not work here: {str(error)[:200]}")
            continue
        reference = reference or results
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, reference, strict=True)]
        print(f"attention: {backend.name} expand={expand} {min(times):.2f} ms, differs by {max(errors):.1e}")
        if max(errors) < 2e-2 and min(times) < best[0]:
            best = (min(times), backend, expand)
    return best[1], best[2]
