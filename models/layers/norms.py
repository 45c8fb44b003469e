"""Normalisation layers of DiTs, each one call, so that one kernel on CUDA does what a block asks for between products.

Shapes: B batch, S tokens, D hidden size. In models of two streams text tokens come first, `boundary` of them; each
stream has a modulation of its own, as has each segment of video tokens with a timestep of its own. Models of one stream
have boundary 0 and give the same for both. The last tokens may be a third segment.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm

from models.kernels.fused_backend import kernels_for


class SegmentVectors(NamedTuple):
    """A vector (B, D) for the first tokens (text, or a first frame of a video), and one for the others.

    The last `last_tokens` tokens have the vector `last`, if there is one.
    """

    text: Tensor
    image: Tensor
    last: Tensor | None = None
    last_tokens: int = 0

    @classmethod
    def same(cls, vector: Tensor) -> SegmentVectors:
        """For models of one stream."""
        return cls(vector, vector)

    @classmethod
    def of_rows(cls, first_BMD: Tensor | None, rest_BMD: Tensor) -> list[SegmentVectors]:
        """M vectors of the first tokens and of the others, in order; None: all tokens are in one segment."""
        rest = rest_BMD.unbind(1)
        if first_BMD is None:
            return [cls.same(each) for each in rest]
        return [cls(*pair) for pair in zip(first_BMD.unbind(1), rest, strict=True)]


class Residual(NamedTuple):
    """A residual stream x (B, S, D), and an update that is still to be added to it: x + gate * update.

    Who is given one may change x.
    """

    x: Tensor
    update: Tensor | None = None
    gate: SegmentVectors | None = None

    def added(self, boundary: int) -> Tensor:
        """The stream with its update; computed in float32, result in x's type."""
        if self.update is None or self.gate is None:
            return self.x
        gate_BSD = _by_token(self.gate, boundary, self.x.shape[1]).float()
        return (self.x.float() + self.update.float() * gate_BSD).to(self.x.dtype)


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

    def forward(self, x_BSD: Tensor, scale: SegmentVectors, shift: SegmentVectors, boundary: int = 0) -> Tensor:
        """norm(x) * (1 + scale) + shift."""
        if (kernels := kernels_for(x_BSD)) is not None:
            modulated: Tensor = kernels.norm_scale_shift(
                x_BSD, scale, shift, boundary, self.eps, is_centred=self.is_centred
            )
            return modulated
        return self._modulated(x_BSD, scale, shift, boundary)

    def after(
        self, residual: Residual, scale: SegmentVectors, shift: SegmentVectors, boundary: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with its update, and that through forward()."""
        if residual.update is None or residual.gate is None:
            return residual.x, self(residual.x, scale, shift, boundary)
        if (kernels := kernels_for(residual.x)) is not None:
            both: tuple[Tensor, Tensor] = kernels.gate_norm_scale_shift(
                *residual, scale, shift, boundary, self.eps, is_centred=self.is_centred
            )
            return both
        x_BSD = residual.added(boundary)
        return x_BSD, self._modulated(x_BSD, scale, shift, boundary)

    def _modulated(self, x: Tensor, scale: SegmentVectors, shift: SegmentVectors, boundary: int) -> Tensor:
        scale_BSD, shift_BSD = (_by_token(each, boundary, x.shape[1]).float() for each in (scale, shift))
        return (self._normed(x) * (1 + scale_BSD) + shift_BSD).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """In float32."""
        return layer_norm(x.float(), (self.size,), eps=self.eps)


class RMSNormScaleShift(LayerNormScaleShift):
    """RMS norm without a weight, then a scale and a shift that the timestep decides."""

    is_centred: ClassVar[bool] = False

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), (self.size,), eps=self.eps)


def _by_token(vectors: SegmentVectors, boundary: int, tokens: int) -> Tensor:
    """(B, 1, D) where one vector serves all tokens, else (B, tokens, D)."""
    text, image, last, last_tokens = vectors
    if last is None and (boundary == 0 or text is image):
        return image[:, None]
    segments = [(text, boundary), (image, tokens - boundary - last_tokens)]
    if last is not None:
        segments.append((last, last_tokens))
    return torch.cat([vector[:, None].expand(-1, length, -1) for vector, length in segments], dim=1)


class RMSNorm(nn.Module):
    """Division by the root mean square over the last dimension, of `size`, times a weight."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * weight."""
        return rms_norm(x, self.weight.shape, self.weight, self.eps)

    def square_sums(self, x: Tensor, parts: int) -> Tensor | None:
        """Sums of squares (B, S, parts) that the mean is made of, where x is not the whole of it; else None.

        x (B, S, parts * channels) holds as many things to normalise side by side.
        """
        del x, parts
        return None


class PlainLayerNorm(nn.Module):
    """Layer norm over the last dimension, of `size`, without weights."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.size = size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean(x)) / std(x)."""
        return layer_norm(x, (self.size,), eps=self.eps)


QKNorm = RMSNorm | PlainLayerNorm
"""A norm of queries or keys. Only RMSNorm has a form whose channels are sharded."""
