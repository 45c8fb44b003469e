"""RoPE with different angles for each head: the frequencies are spread over the channels of all heads.

Shapes: T tokens, H heads, K head size, A axes of a position.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.rotation import HeadRotation


class SelectHeads(nn.Module):
    """Identity on a tensor with a dimension of all heads. A parallel plan can replace it with a selection."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, K / 2) to (..., selected heads, K / 2)."""
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
    """RoPE for positions (T, A), where axis i ranges over [0, extents[i]] and is scaled to [-1, 1].

    The heads * head_size / 2 channel pairs are divided evenly between the axes, interleaved. The frequencies of an axis
    are spaced geometrically from pi / 2 to theta * pi / 2, and computed in float64 (`is_double`) or float32. Where the
    number of axes does not divide the number of pairs, the first pairs are not rotated.
    """
    pairs, axes = heads * head_size // 2, positions_TA.shape[1]
    precision = torch.float64 if is_double else torch.float32
    exponents = torch.linspace(0.0, 1.0, pairs // axes, dtype=precision, device=positions_TA.device)
    frequencies = (torch.pow(theta, exponents) * torch.pi / 2.0).float()
    relative = torch.stack([positions_TA[:, axis] / extent for axis, extent in enumerate(extents)], dim=-1)
    angles = ((relative[..., None] * 2 - 1) * frequencies).transpose(1, 2).flatten(1)
    unrotated = angles.new_zeros(len(angles), pairs - angles.shape[1])
    angles_THK = torch.cat((unrotated, angles), dim=1).view(-1, heads, head_size // 2)
    return HeadRotation(angles_THK.cos(), angles_THK.sin(), is_neox_style)
