"""Rotary position embedding (RoPE) of queries and keys.

Shapes: B batch, T tokens, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosine and sine of the rotation angle of each channel pair, float32 (T, K / 2).

    A pair is two adjacent channels. With `is_neox_style`, it is a channel of the head's first half and the
    corresponding channel of the second half.
    """

    cos: Tensor
    sin: Tensor
    is_neox_style: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Both tensors, by attribute name."""
        return {"cos": self.cos, "sin": self.sin}

    def of(self, tokens: slice) -> Rotation:
        """The rotation of a range of tokens."""
        return replace(self, cos=self.cos[tokens], sin=self.sin[tokens])

    @cached_property
    def interleaved(self) -> Tensor:
        """Interleaved cosine and sine of each pair, (T, K), the layout read by GEMM epilogues."""
        return torch.stack((self.cos, self.sin), dim=-1).flatten(1)


class HeadRotation(NamedTuple):
    """Rotation with separate angles for each head: cosine and sine, float32 (T, H, K / 2).

    A pair is two adjacent channels. With `is_neox_style`, it is a channel of the head's first half and the
    corresponding channel of the second half.
    """

    cos: Tensor
    sin: Tensor
    is_neox_style: bool


def apply_rotary(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE to x (B, T, H, K). Computes in float32; the result has x's dtype."""
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    if rotation.is_neox_style:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_heads(x: Tensor, rotation: HeadRotation) -> Tensor:
    """Apply RoPE with separate angles for each head to x (B, T, H, K); see apply_rotary()."""
    pairs = (2, x.shape[-1] // 2) if rotation.is_neox_style else (x.shape[-1] // 2, 2)
    axis = -2 if rotation.is_neox_style else -1
    first, second = x.float().reshape(*x.shape[:-1], *pairs).unbind(axis)
    cos, sin = rotation.cos, rotation.sin
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=axis)
    return rotated.flatten(-2).to(x.dtype)
