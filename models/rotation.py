"""Angles by which queries and keys are rotated to their positions (RoPE).

Shapes: T tokens, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

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
    def interleaved(self) -> Tensor:
        """cos and sin of each pair side by side, (tokens, head size): the form that GEMM epilogues read."""
        return torch.stack((self.cos, self.sin), dim=-1).flatten(1)


class HeadRotation(NamedTuple):
    """cos and sin of the angle of each pair of channels, float32 (T, H, K / 2).

    `is_neox_style`: a pair is a channel of a head's first half with its counterpart in the second half; else it is two
    neighbouring channels.
    """

    cos: Tensor
    sin: Tensor
    is_neox_style: bool


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs of channels of x (batch, tokens, heads, head size). In float32, result in x's type."""
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    if rotation.is_neox_style:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_heads(x: Tensor, rotation: HeadRotation) -> Tensor:
    """Apply RoPE to x (B, T, H, K). In float32, result in x's type."""
    pairs = (2, x.shape[-1] // 2) if rotation.is_neox_style else (x.shape[-1] // 2, 2)
    axis = -2 if rotation.is_neox_style else -1
    first, second = x.float().reshape(*x.shape[:-1], *pairs).unbind(axis)
    cos, sin = rotation.cos, rotation.sin
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis)
    return rotated.flatten(-2).to(x.dtype)
