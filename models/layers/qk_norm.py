"""Normalises queries and keys and rotates them to their positions, in one pass.

Shapes: B batch, S tokens, D = heads * head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.head_norms import QKNormOperands
from models.kernels.qk_norm_rotate import AnyRotation, qk_norm_rotate, split_heads
from models.layers.norms import QKNorm, RMSNorm
from models.token_segments import TokenSegments


@dataclass(frozen=True)
class HeadNorms:
    """The norm of each part of a tensor (B, S, parts * D): of queries and keys, or of queries alone.

    A norm of the head size works on each head by itself, any other on all heads together. `first` are those of the
    first segment's tokens where these have norms of their own.
    """

    norms: tuple[QKNorm, ...]
    head_size: int
    first: tuple[QKNorm, ...] | None = None

    def of(self, parts: slice) -> HeadNorms:
        """Those of some parts."""
        return HeadNorms(self.norms[parts], self.head_size, None if self.first is None else self.first[parts])


def apply_qk_norm(
    x: Tensor,
    norms: HeadNorms,
    rotation: AnyRotation | None = None,
    segments: TokenSegments | None = None,
    out: Sequence[Tensor] | None = None,
) -> None:
    """Normalise and rotate the parts of x (B, S, parts * D), float32 inside, in place unless `out` is given.

    `out` are tensors (B, S, heads, head size), one for each part of x, which may then have parts without a norm at its
    end: these are copied. A part may be its own `out`. `segments` are needed where the first has norms of its own.
    """
    out = in_place(x, len(norms.norms), norms.head_size) if out is None else out
    normed = x[..., : len(norms.norms) * x.shape[-1] // len(out)]
    first_norm = norms.norms[0]
    sums = first_norm.square_sums(normed, len(norms.norms)) if isinstance(first_norm, RMSNorm) else None
    rest = tuple(norm.operand for norm in norms.norms)
    if norms.first is None:
        qk_norm_rotate(x, QKNormOperands(rest, rest, norms.head_size), rotation, 0, sums, out)
        return
    assert segments is not None, "norms of the first segment need its length"
    first = tuple(norm.operand for norm in norms.first)
    qk_norm_rotate(x, QKNormOperands(first, rest, norms.head_size), rotation, segments.lengths[0], sums, out)


@dataclass(frozen=True)
class ProjectedHeads:
    """Queries, keys and values side by side (B, S, 3 * D), projected and still to be normalised and rotated, once."""

    qkv: Tensor
    norms: HeadNorms
    rotation: AnyRotation
    segments: TokenSegments | None = None

    @property
    def key_values_shape(self) -> tuple[int, ...]:
        """(B, S, 2, heads, head size)."""
        batch, tokens, width = self.qkv.shape
        return batch, tokens, 2, width // 3 // self.norms.head_size, self.norms.head_size

    @property
    def dtype(self) -> torch.dtype:
        """The type of what was projected."""
        return self.qkv.dtype

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, S, heads, head size), the same memory."""
        normed = self.qkv[..., : 2 * self.qkv.shape[-1] // 3]
        apply_qk_norm(normed, self.norms, self.rotation, self.segments)
        q, k, v = in_place(self.qkv, 3, self.norms.head_size)
        return q, k, v

    def all_into(self, key_values: Tensor) -> Tensor:
        """Queries (B, S, heads, head size), the same memory; `key_values` is (B, S, 2, heads, head size)."""
        q = in_place(self.qkv, 3, self.norms.head_size)[0]
        apply_qk_norm(self.qkv, self.norms, self.rotation, self.segments, out=(q, *key_values.unbind(2)))
        return q


def in_place(x: Tensor, parts: int, head_size: int) -> tuple[Tensor, ...]:
    """The parts of x (B, S, parts * D) as heads (B, S, heads, head size), the same memory."""
    return tuple(split_heads(part, head_size) for part in x.chunk(parts, dim=-1))
