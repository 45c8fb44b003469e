"""Rotary position embedding over several axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """cos and sin of the angle of each pair of channels, float32 (tokens, head size / 2).

    Pairs are neighbouring channels; with `is_neox_style` a channel of the first half of a head and its counterpart in
    the second half.
    """

    cos: Tensor
    sin: Tensor
    is_neox_style: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """By their names."""
        return {"cos": self.cos, "sin": self.sin}

    def of(self, tokens: slice) -> Rotation:
        """That of some tokens."""
        return replace(self, cos=self.cos[tokens], sin=self.sin[tokens])

    @cached_property
    def turns(self) -> Tensor:
        """cos and sin of each pair side by side, (tokens, head size): as fused products read them."""
        return torch.stack((self.cos, self.sin), dim=-1).flatten(1)


def rotary_embedding(ids: Tensor, axes_dims: Sequence[int], theta: float = 10000.0) -> Rotation:
    """Angles for positions `ids` (tokens, axes): axis i turns axes_dims[i] channels of a head.

    Computed in float64: at large positions float32 angles are visibly wrong.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(torch.outer(ids[:, axis].double(), 1.0 / theta**exponents))
    joined = torch.cat(angles, dim=-1)
    return Rotation(joined.cos().float(), joined.sin().float())


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs of channels of x (batch, tokens, heads, head size). In float32, result in x's type."""
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    if rotation.is_neox_style:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
