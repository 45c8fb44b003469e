"""Normalisation layers of DiTs, each one call so that a fused kernel can take its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm


class LayerNormScaleShift(nn.Module):
    """Layer norm without weights of its own, then a scale and a shift that the timestep decides.

    x is (batch, tokens, size); scale and shift are (batch, size).
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift."""
        return layer_norm(x, (self.size,), eps=self.eps) * (1 + scale[:, None]) + shift[:, None]


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, times a weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def apply_qk_norm(q: Tensor, k: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys per head; both are (batch, tokens, heads, head size)."""
    return norm_q(q), norm_k(k)
