"""Embeddings of scalars (timestep and guidance) and of text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu


def sinusoidal_embedding(values: Tensor, size: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of values (batch,), float32 (batch, size).

    Cosines, then sines, at falling frequencies.
    """
    half = size // 2
    falling = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[:, None].float() * torch.exp(-math.log(max_period) * falling)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class EmbeddingMLP(nn.Module):
    """Two linear layers with SiLU between them, for feature vectors."""

    def __init__(self, in_size: int, size: int, *, has_bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size, bias=has_bias)
        self.linear_2 = nn.Linear(size, size, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_size) to (batch, size), computed in the dtype of the weights."""
        hidden: Tensor = self.linear_1(x.to(self.linear_1.weight.dtype))
        embedded: Tensor = self.linear_2(silu(hidden))
        return embedded


class TextProjection(nn.Module):
    """Two linear layers with GELU (tanh approximation) between them, for text tokens."""

    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in_size) to (B, T, size)."""
        projected: Tensor = self.linear_2(gelu(self.linear_1(x), approximate="tanh"))
        return projected
