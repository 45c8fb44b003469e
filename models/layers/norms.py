"""Norms of transformer blocks, modulated by a timestep, and the residual stream that they read.

Shapes: B batch, S tokens, D hidden size. Each segment of tokens (text, image, a first frame) has vectors of its own.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from models.kernels.head_norms import Norm
from models.kernels.norm_modulate import Modulated, add_update, gate_norm_modulate, norm_modulate
from models.token_segments import SegmentVectors


class Residual(NamedTuple):
    """A residual stream x (B, S, D), and an update that is still to be added to it: x + gate * update.

    A function that takes a Residual owns x, and may modify it in place.
    """

    x: Tensor
    update: Tensor | None = None
    gate: SegmentVectors | None = None

    def added(self) -> Tensor:
        """The stream with its update; computed in float32, result in x's type."""
        if self.update is None or self.gate is None:
            return self.x
        return add_update(self.x, self.update, self.gate)


class LayerNormScaleShift(nn.Module):
    """Layer norm without weights of its own, then a scale and a shift that the timestep decides.

    Statistics and modulation are computed in float32; results are in x's type.
    """

    is_centred: ClassVar[bool] = True
    """Whether the mean is subtracted."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(self, x_BSD: Tensor, scale: SegmentVectors, shift: SegmentVectors) -> Tensor:
        """norm(x) * (1 + scale) + shift."""
        return norm_modulate(x_BSD, Modulated(scale, shift, self.eps, self.is_centred))

    def after(self, residual: Residual, scale: SegmentVectors, shift: SegmentVectors) -> tuple[Tensor, Tensor]:
        """The residual stream with its update, and that through forward()."""
        x_BSD, update_BSD, gate = residual
        if update_BSD is None or gate is None:
            return x_BSD, self(x_BSD, scale, shift)
        return gate_norm_modulate(x_BSD, update_BSD, gate, Modulated(scale, shift, self.eps, self.is_centred))


class RMSNormScaleShift(LayerNormScaleShift):
    """RMS norm without a weight, then a scale and a shift that the timestep decides."""

    is_centred: ClassVar[bool] = False


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, of `size`, times a weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size = size
        self.eps = eps

    @property
    def operand(self) -> Norm:
        """The norm as kernels take it."""
        return Norm(self.size, self.eps, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def square_sums(self, x: Tensor, parts: int) -> Tensor | None:
        """Sums of squares (B, S, parts) that the mean is made of, where x is not the whole of it; else None.

        x (B, S, parts * channels) holds as many tensors to normalise side by side.
        """
        del x, parts
        return None


class PlainLayerNorm(nn.Module):
    """Layer norm over the last dimension, of `size`, without weights."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    @property
    def operand(self) -> Norm:
        """The norm as kernels take it."""
        return Norm(self.size, self.eps, None)

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean(x)) / std(x)."""
        return layer_norm(x, (self.size,), eps=self.eps)


QKNorm = RMSNorm | PlainLayerNorm
"""A norm of queries or keys. Only RMSNorm has a form whose channels are sharded."""
