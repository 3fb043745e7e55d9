# SPDX-License-Identifier: Apache-2.0
"""Muon for the hidden matrices, AdamW for the embedding and the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .model import Nano

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replaces the singular values of a stack of matrices [layers, out, in] by about 1 (Newton-Schulz, bf16).

    The quintic iteration of Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class NanoOptimizer:
    """Both optimizers behind one step.

    Args:
        model: whose parameters to train.
        muon_lr: step of the hidden matrices, in units of their spectral norm.
        adam_lr: step of the embedding; the norms use the same.
        decay: decoupled weight decay of the hidden matrices.
    """

    def __init__(self, model: Nano, muon_lr: float, adam_lr: float, decay: float) -> None:
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay
        self.matrices = {name: getattr(model, name) for name in Nano.MATRICES}
        self.momentum = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        others = [p for name, p in model.named_parameters() if name not in self.matrices]
        fused = others[0].is_cuda
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    @torch.no_grad()
    def step(self, scale: float, warm: float = 1.0) -> None:
        """Updates the parameters from their gradients and clears those.

        Args:
            scale: factor on both learning rates.
            warm: 0 to 1, how far Muon's momentum has warmed up from 0.85 to 0.95.
        """
        beta = 0.85 + 0.10 * min(1.0, warm)
        for name, p in self.matrices.items():
            assert p.grad is not None
            buffer = self.momentum[name].lerp_(p.grad, 1 - beta)
            update = orthogonalize(p.grad.lerp(buffer, beta))
            lr = self.muon_lr * scale
            gain = max(1.0, p.size(-2) / p.size(-1)) ** 0.5
            p.mul_(1 - lr * self.decay).add_(update.to(p.dtype), alpha=-lr * gain)
            p.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` takes."""
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state."""
        for name, buffer in self.momentum.items():
            buffer.copy_(state["momentum"][name])
        self.adam.load_state_dict(state["adam"])


def learning_rate_scale(progress: float, warmup: float = 0.01, decay_from: float = 0.45) -> float:
    """Warm-up, a plateau, then a linear decay to zero (progress from 0 to 1)."""
    rise = min(1.0, (progress + 1e-3) / warmup)
    fall = min(1.0, max(0.0, (1.0 - progress) / (1.0 - decay_from)))
    return rise * fall
