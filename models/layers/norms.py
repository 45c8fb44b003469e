"""Norms of transformer blocks with modulation by the timestep, and the residual stream.

Shapes: B batch, S tokens, D hidden size. Modulations may differ between token segments (text, image, first frame).
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from models.kernels.norm_modulate import Modulated, add_update, gate_norm_modulate, norm_modulate
from models.kernels.qk_norm_parameters import NormParameters
from models.token_segments import SegmentVectors


class Residual(NamedTuple):
    """Residual stream x (B, S, D) with a pending update: its value is x + gate * update.

    The callee owns x and may modify it in place.
    """

    x: Tensor
    update: Tensor | None = None
    gate: SegmentVectors | None = None

    def added(self) -> Tensor:
        """x + gate * update, computed in float32 and returned in x's dtype."""
        if self.update is None or self.gate is None:
            return self.x
        return add_update(self.x, self.update, self.gate)


class LayerNormScaleShift(nn.Module):
    """Layer norm without learned weights, then scale and shift by modulations.

    Statistics and modulation are computed in float32; results are in x's dtype.
    """

    is_centered: ClassVar[bool] = True
    """Whether the norm subtracts the mean."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(self, x_BSD: Tensor, scale: SegmentVectors, shift: SegmentVectors) -> Tensor:
        """norm(x) * (1 + scale) + shift."""
        return norm_modulate(x_BSD, Modulated(scale, shift, self.eps, self.is_centered))

    def after(self, residual: Residual, scale: SegmentVectors, shift: SegmentVectors) -> tuple[Tensor, Tensor]:
        """Value of the residual stream (B, S, D), and forward() of this value."""
        x_BSD, update_BSD, gate = residual
        if update_BSD is None or gate is None:
            return x_BSD, self(x_BSD, scale, shift)
        return gate_norm_modulate(x_BSD, update_BSD, gate, Modulated(scale, shift, self.eps, self.is_centered))


class RMSNormScaleShift(LayerNormScaleShift):
    """RMS norm without a learned weight, then scale and shift by modulations."""

    is_centered: ClassVar[bool] = False


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, of size `size`, with a weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size = size
        self.eps = eps

    @property
    def norm_parameters(self) -> NormParameters:
        """The norm as an argument of kernels."""
        return NormParameters(self.size, self.eps, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def square_sums(self, x: Tensor, parts: int) -> Tensor | None:
        """Sums of squares (B, S, parts) over all normalized channels; None if x has all of these channels.

        The tensor x (B, S, parts * channels) contains `parts` concatenated tensors with separate norms. This class
        returns None.
        """
        del x, parts
        return None


class PlainLayerNorm(nn.Module):
    """Layer norm over the last dimension, of size `size`, without weights."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    @property
    def norm_parameters(self) -> NormParameters:
        """The norm as an argument of kernels."""
        return NormParameters(self.size, self.eps, None)

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean(x)) / std(x)."""
        return layer_norm(x, (self.size,), eps=self.eps)


QKNorm = RMSNorm | PlainLayerNorm
"""Norm of queries or keys."""
