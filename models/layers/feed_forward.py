"""The feed-forward half of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu


class _Projection(nn.Module):
    """The layer that checkpoints call net.0.proj, with its activation."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear; four times as wide inside. Parameters are net.0.proj and net.2."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # Position 1 is a dropout in training code; it has no parameters, but the names count it.
        self.net = nn.Sequential(_Projection(size, 4 * size), nn.Identity(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, size) to the same."""
        result: Tensor = self.net(x)
        return result
