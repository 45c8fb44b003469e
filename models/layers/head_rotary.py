"""Rotary position embedding whose angles differ between heads: frequencies are spread over all channels of a token.

Shapes: T tokens, H heads, K head size, A axes of a position.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.rotation import HeadRotation


class OwnHeads(nn.Module):
    """A tensor with a dimension of all heads. A parallel form takes those of its rank."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, K) to (..., heads of this rank, K)."""
        return x


def head_rotation(
    positions_TA: Tensor,
    extents: Sequence[float],
    heads: int,
    head_size: int,
    *,
    theta: float,
    is_neox_style: bool,
    is_double: bool = True,
) -> HeadRotation:
    """Angles for positions in [0, extent] of each axis, which are mapped to [-1, 1].

    Each axis has as many frequencies as fit in heads x head size channels, from pi / 2 to theta * pi / 2 in geometric
    steps, computed in float64 where `is_double`; axes alternate. The first channels are left alone where the number of
    axes does not divide.
    """
    pairs, axes = heads * head_size // 2, positions_TA.shape[1]
    precision = torch.float64 if is_double else torch.float32
    exponents = torch.linspace(0.0, 1.0, pairs // axes, dtype=precision, device=positions_TA.device)
    frequencies = (torch.pow(theta, exponents) * torch.pi / 2.0).float()
    relative = torch.stack([positions_TA[:, axis] / extent for axis, extent in enumerate(extents)], dim=-1)
    angles = ((relative[..., None] * 2 - 1) * frequencies).transpose(1, 2).flatten(1)
    still = angles.new_zeros(len(angles), pairs - angles.shape[1])
    angles_THK = torch.cat((still, angles), dim=1).view(-1, heads, head_size // 2)
    return HeadRotation(angles_THK.cos(), angles_THK.sin(), is_neox_style)
