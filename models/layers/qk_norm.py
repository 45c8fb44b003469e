"""Norms of queries and keys as modules; models.kernels.qk_norm_rotate applies them and RoPE.

Shapes: B batch, S tokens, D = heads * head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.qk_norm_parameters import QKNormParameters
from models.kernels.qk_norm_rotate import AnyRotation, qk_norm_rotate, split_heads
from models.layers.norms import QKNorm, RMSNorm
from models.token_segments import TokenSegments


@dataclass(frozen=True)
class QKNormModules:
    """Norm modules of the parts of a tensor (B, S, parts * D): of queries and keys, or of queries only.

    A norm of size `head_size` is over each head, a norm of another size over all heads together. `first` are the norms
    of the tokens of the first segment; None: `norms` apply to all tokens.
    """

    norms: tuple[QKNorm, ...]
    head_size: int
    first: tuple[QKNorm, ...] | None = None

    def of(self, parts: slice) -> QKNormModules:
        """The norms of some parts."""
        return QKNormModules(self.norms[parts], self.head_size, None if self.first is None else self.first[parts])


def apply_qk_norm(
    x: Tensor,
    norms: QKNormModules,
    rotation: AnyRotation | None = None,
    segments: TokenSegments | None = None,
    out: Sequence[Tensor] | None = None,
) -> None:
    """Apply norms and RoPE to the parts of x (B, S, parts * D), in place unless `out` is given.

    Computes in float32. `out` has a tensor (B, S, heads, head size) for each part of x, which may be a view of that
    part. With `out`, x may have further parts without a norm at its end; these are copied. `segments` are needed where
    `norms.first` is set.
    """
    out = head_views(x, len(norms.norms), norms.head_size) if out is None else out
    normed = x[..., : len(norms.norms) * x.shape[-1] // len(out)]
    first_norm = norms.norms[0]
    sums = first_norm.square_sums(normed, len(norms.norms)) if isinstance(first_norm, RMSNorm) else None
    rest = tuple(norm.norm_parameters for norm in norms.norms)
    if norms.first is None:
        qk_norm_rotate(x, QKNormParameters(rest, rest, norms.head_size), rotation, 0, sums, out)
        return
    assert segments is not None, "norms of the first segment need its length"
    first = tuple(norm.norm_parameters for norm in norms.first)
    qk_norm_rotate(x, QKNormParameters(first, rest, norms.head_size), rotation, segments.lengths[0], sums, out)


@dataclass(frozen=True)
class ProjectedHeads:
    """Projected queries, keys, values, concatenated (B, S, 3 * D), before norms and RoPE.

    For a single use: all() and all_into() modify `qkv` in place.
    """

    qkv: Tensor
    norms: QKNormModules
    rotation: AnyRotation
    segments: TokenSegments | None = None

    @property
    def key_values_shape(self) -> tuple[int, ...]:
        """(B, S, 2, heads, head size)."""
        batch, tokens, width = self.qkv.shape
        return batch, tokens, 2, width // 3 // self.norms.head_size, self.norms.head_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the projected tensors."""
        return self.qkv.dtype

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, S, heads, head size), as views of `qkv`."""
        normed = self.qkv[..., : 2 * self.qkv.shape[-1] // 3]
        apply_qk_norm(normed, self.norms, self.rotation, self.segments)
        q, k, v = head_views(self.qkv, 3, self.norms.head_size)
        return q, k, v

    def all_into(self, key_values: Tensor) -> Tensor:
        """Queries (B, S, heads, head size), a view of `qkv`; writes `key_values` (B, S, 2, heads, head size)."""
        q = head_views(self.qkv, 3, self.norms.head_size)[0]
        apply_qk_norm(self.qkv, self.norms, self.rotation, self.segments, out=(q, *key_values.unbind(2)))
        return q


def head_views(x: Tensor, parts: int, head_size: int) -> tuple[Tensor, ...]:
    """Views (B, S, heads, head size) of the parts of x (B, S, parts * D)."""
    return tuple(split_heads(part, head_size) for part in x.chunk(parts, dim=-1))
