"""Normalises queries and keys and turns them to their positions, in one pass.

Shapes: B batch, S tokens, D = heads * head size. In models of two streams text tokens come first, `boundary` of them,
and each stream has weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.fused_backend import kernels_for
from models.layers.head_rotary import HeadRotation, rotate_heads
from models.layers.norms import QKNorm, RMSNorm
from models.layers.rotary import Rotation, apply_rotary


def split_heads(x: Tensor, head_size: int) -> Tensor:
    """(..., D) to (..., heads, head size), the same memory."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_size, head_size)


@dataclass(frozen=True)
class QKNorms:
    """The norm of each part of a tensor (B, S, parts * D): of queries and keys, or of queries alone.

    A norm of the head size works on each head by itself, any other on all heads together. Norms are all RMS norms, or
    all layer norms of the head size.
    """

    text: tuple[QKNorm, ...]
    image: tuple[QKNorm, ...]
    head_size: int

    @property
    def per_head(self) -> bool:
        """Whether each head is normalised by itself."""
        return self.image[0].size == self.head_size

    @property
    def weights(self) -> list[Tensor]:
        """Weights of the norms of each part, text first; none for norms without weights."""
        pairs = zip(self.text, self.image, strict=True)
        return [norm.weight for pair in pairs for norm in pair if isinstance(norm, RMSNorm)]

    def of(self, parts: slice) -> QKNorms:
        """Those of some parts."""
        return QKNorms(self.text[parts], self.image[parts], self.head_size)


def apply_qk_norm(
    x: Tensor,
    norms: QKNorms,
    rotation: Rotation | HeadRotation | None = None,
    boundary: int = 0,
    out: Sequence[Tensor] | None = None,
) -> None:
    """Normalise and turn the parts of x (B, S, parts * D), float32 inside, in place unless told otherwise.

    `out` are tensors (B, S, heads, head size), one for each part of x, which may then have parts without a norm at its
    end: these are copied. A part may be its own `out`.
    """
    out = in_place(x, len(norms.image), norms.head_size) if out is None else out
    normed = x[..., : len(norms.image) * x.shape[-1] // len(out)]
    first = norms.image[0]
    sums = first.square_sums(normed, len(norms.image)) if isinstance(first, RMSNorm) else None
    if (kernels := kernels_for(x)) is not None and norms.head_size.bit_count() == 1:
        kernels.apply_qk_norm(x, norms, rotation, boundary, sums, out)
        return
    parts = x.chunk(len(out), dim=-1)
    for index, part in enumerate(parts[: len(norms.image)]):
        pieces = [
            _normalised(part[:, rows], norm, norms, None if sums is None else sums[:, rows, index, None])
            for rows, norm in (
                (slice(0, boundary), norms.text[index]),
                (slice(boundary, None), norms.image[index]),
            )
        ]
        heads = split_heads(torch.cat(pieces, dim=1), norms.head_size)
        out[index].copy_(_rotated(heads, rotation))
    for part, copy in zip(parts[len(norms.image) :], out[len(norms.image) :], strict=True):
        copy.copy_(split_heads(part, norms.head_size))


def _rotated(heads: Tensor, rotation: Rotation | HeadRotation | None) -> Tensor:
    """(B, S, heads, head size) to the same."""
    if isinstance(rotation, HeadRotation):
        return rotate_heads(heads, rotation)
    return heads if rotation is None else apply_rotary(heads, rotation)


def in_place(x: Tensor, parts: int, head_size: int) -> tuple[Tensor, ...]:
    """The parts of x (B, S, parts * D) as heads (B, S, heads, head size), the same memory."""
    return tuple(split_heads(part, head_size) for part in x.chunk(parts, dim=-1))


def _normalised(x: Tensor, norm: QKNorm, norms: QKNorms, sums: Tensor | None) -> Tensor:
    """(B, tokens, D) to the same; `sums` (B, tokens, 1) of squares where x is a part of what is normalised."""
    if sums is not None:
        assert isinstance(norm, RMSNorm), "only an RMSNorm has sums of squares over ranks"
        scaled: Tensor = x.float() * torch.rsqrt(sums / norm.size + norm.eps) * norm.weight.float()
        return scaled.to(x.dtype)
    if norms.per_head:
        per_head: Tensor = norm(split_heads(x, norms.head_size)).flatten(-2)
        return per_head
    whole: Tensor = norm(x)
    return whole
