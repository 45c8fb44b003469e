"""Attention of DiTs: the Attention module, and self-attention without its output projection.

Parameter names are those of Diffusers' checkpoints. Shapes: B batch, S tokens, D hidden size, H heads, K head size.
"""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.kernels.attention import attention
from models.kernels.gemm import can_norm_rotate, multiply_norm_rotate_into, supports_heads
from models.kernels.qk_norm_rotate import AnyRotation, split_heads
from models.layers.linear import ALL, JoinedLinear, JoinsWeights, Linear, project
from models.layers.norms import QKNorm, RMSNorm
from models.layers.qk_norm import ProjectedHeads, QKNormModules, apply_qk_norm, head_views
from models.rotation import Rotation
from models.token_segments import TokenSegments

QUERIES, KEYS_AND_VALUES = slice(0, 1), slice(1, 3)


@dataclass(frozen=True)
class KeyValueCache:
    """KV cache of earlier tokens; the keys and values of the current tokens are written into it.

    `slab` is the tensor of the cache, (2, B, capacity, H, K): keys, then values. The current tokens are written to
    `slots`, in order; afterwards the first `length` positions are valid. Attention does not depend on the order of
    keys, so that `slots` may overwrite tokens that have left the attention window.
    """

    slab: Tensor
    slots: tuple[slice, ...]
    length: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, S, H, K) to the slots. Returns views of all valid keys and values."""
        keys, values = self.slab.unbind()
        begin = 0
        for slot in self.slots:
            end = begin + slot.stop - slot.start
            keys[:, slot].copy_(k[:, begin:end])
            values[:, slot].copy_(v[:, begin:end])
            begin = end
        return keys[:, : self.length], values[:, : self.length]


class Projection(Protocol):
    """Deferred projection of tokens to queries, keys and values (B, S, H, K). Attention chooses the buffers."""

    @property
    def key_values_shape(self) -> tuple[int, ...]:
        """(B, S, 2, H, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the projected tensors."""

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, by one GEMM."""

    def all_into(self, key_values: Tensor) -> Tensor:
        """Queries, by one GEMM that also computes keys and values, written to `key_values` (B, S, 2, H, K)."""


class SeparableProjection(Projection, Protocol):
    """A projection that can also compute its queries by a separate GEMM."""

    def keys_and_values(self, out: Tensor | None = None) -> Tensor:
        """Keys and values (B, S, 2, H, K), in `out` if given."""

    def queries(self) -> Tensor:
        """Queries (B, S, H, K)."""


class KeyValues:
    """Keys and values (B, S, H, K) to attend to. Subclasses receive them asynchronously."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait for all keys and values, and return them."""
        return self.k, self.v


class PendingAttention(NamedTuple):
    """Inputs of an attention call that start() began. Only finish() may read them, as a transfer may be pending."""

    queries: Tensor
    key_values: KeyValues


class Attention(nn.Module):
    """attention() as a module, which a parallel plan can replace.

    A replacement may transfer queries, keys and values asynchronously. A block with independent computation calls
    start(), computes, and calls finish(): the computation overlaps with the transfer. Other blocks call attend().
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries, keys and values (B, S, H, K)."""
        return self.finish(PendingAttention(q, KeyValues(k, v)))

    def attend(self, projection: SeparableProjection, cache: KeyValueCache | None = None) -> Tensor:
        """Project and attend, also to the tokens in the cache. Returns (B, S, H, K)."""
        return self.finish(self.start(projection), cache=cache)

    def start(self, projection: Projection) -> PendingAttention:
        """Project queries, keys and values by one GEMM, and start their transfer if there is one."""
        q, k, v = projection.all()
        return PendingAttention(q, KeyValues(k, v))

    def cached_heads(self, heads: int) -> int:
        """Number of heads in a KV cache of a layer with `heads` heads."""
        return heads

    def finish(
        self, pending: PendingAttention, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Complete the attention call, with the tokens in the cache as further keys. Writes to `out` if given."""
        keys, values = pending.key_values.wait()
        if cache is not None:
            keys, values = cache.update(keys, values)
        return attention(pending.queries, keys, values, out=out)


class SelfAttention(JoinsWeights):
    """Self-attention with norms and RoPE for queries and keys, without the output projection.

    `norm_size` None: the norms are over each head; otherwise they are over all heads together.
    """

    def __init__(
        self,
        size: int,
        head_size: int,
        norm_size: int | None = None,
        eps: float = 1e-6,
        norm: Callable[[int, float], QKNorm] = RMSNorm,
        *,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = Linear(size, size, has_bias=has_bias)
        self.to_k = Linear(size, size, has_bias=has_bias)
        self.to_v = Linear(size, size, has_bias=has_bias)
        self.norm_q = norm(norm_size or head_size, eps)
        self.norm_k = norm(norm_size or head_size, eps)
        self.inner = Attention()
        self.joined: JoinedLinear | None = None
        # Weights of the norms of queries and keys, (2, D); None where a GEMM epilogue cannot apply them.
        self.scales: Tensor | None = None

    def join_weights(self) -> None:
        """Join the three projections into one GEMM. The weights must be loaded."""
        self.joined = JoinedLinear(self._projections)
        norms = [norm for norm in (self.norm_q, self.norm_k) if isinstance(norm, RMSNorm)]
        if norms and all(supports_heads(self.head_size, norm.size, norm.eps) for norm in norms):
            heads = self._size // self.head_size
            self.scales = torch.stack([norm.weight.data.repeat(heads) for norm in norms])

    def forward(
        self,
        x_BSD: Tensor,
        rotation: AnyRotation,
        segments: TokenSegments | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attention output (B, S, D) of tokens (B, S, D), which also attend to the tokens in the cache.

        `segments` are needed by subclasses with separate weights for each segment.
        """
        return self.inner.attend(_HeadProjection(self, x_BSD, rotation, segments), cache).flatten(2)

    def start(self, x_BSD: Tensor, rotation: AnyRotation, segments: TokenSegments | None = None) -> PendingAttention:
        """Project the tokens and start the attention call. Independent computation may run before finish()."""
        return self.inner.start(_HeadProjection(self, x_BSD, rotation, segments))

    def finish(self, pending: PendingAttention, out: Tensor | None = None) -> Tensor:
        """Attention output (B, S, D), in `out` if given."""
        heads = None if out is None else split_heads(out, self.head_size)
        attended = self.inner.finish(pending, heads)
        return attended.flatten(2) if out is None else out

    @property
    def cached_heads(self) -> int:
        """Number of heads in a KV cache of this layer."""
        return self.inner.cached_heads(self._size // self.head_size)

    @property
    def _projections(self) -> tuple[Linear, ...]:
        return self.to_q, self.to_k, self.to_v

    def _project(self, x_BSD: Tensor, out: Tensor, segments: TokenSegments | None, which: slice) -> None:
        """Project to the queries, keys and values that `which` selects; write them to `out`, concatenated."""
        del segments  # All tokens have the same weights.
        project(x_BSD, out, self.joined, self._projections, which)

    def _project_normed(
        self, x_BSD: Tensor, out: Tensor, rotation: AnyRotation, segments: TokenSegments | None, which: slice
    ) -> None:
        """Run _project(), then apply norms and RoPE to queries and keys."""
        if isinstance(rotation, Rotation) and self._can_fuse(x_BSD, out):
            self._write_normed(x_BSD, out, rotation.interleaved, which)
        else:
            self._project(x_BSD, out, segments, which)
            self._normalize(out, rotation, segments, which)

    def _normalize(self, out: Tensor, rotation: AnyRotation, segments: TokenSegments | None, which: slice) -> None:
        """Apply norms and RoPE in place to the queries and keys in `out`."""
        normed, _ = _split(which)
        width = self._size * len(self._projections[normed])
        apply_qk_norm(out[..., :width], self._norms().of(normed), rotation, segments)

    def _can_fuse(self, x: Tensor, out: Tensor) -> bool:
        """Whether the epilogue of a GEMM of x (B, tokens, D) can apply norms and RoPE."""
        if self.joined is None or self.joined.weight.scale is not None or self.scales is None:
            return False
        return can_norm_rotate(x, self.joined.weight, out)

    def _write_normed(self, x: Tensor, out: Tensor, angles: Tensor, which: slice) -> None:
        """_project_normed() by GEMM epilogues: one GEMM for queries and keys, one for values. Needs _can_fuse()."""
        assert self.joined is not None, "weights are not joined"
        assert self.scales is not None, "an epilogue cannot apply these norms; call _can_fuse() first"
        normed, values = _split(which)
        weight, bias = self.joined.of(normed)
        scale = self.scales[normed].flatten()
        multiply_norm_rotate_into(x, weight, bias, scale, angles, out[..., : len(bias)])
        if self._projections[values]:
            self.joined.into(x, out[..., len(bias) :], values)

    @property
    def _size(self) -> int:
        """Output size of one projection, read from the weight: a shard has fewer heads than the config."""
        return len(self.to_q.weight)

    def _norms(self) -> QKNormModules:
        return QKNormModules((self.norm_q, self.norm_k), self.head_size)


@dataclass(frozen=True)
class _HeadProjection:
    """The projections of a SelfAttention applied to tokens x (B, S, D)."""

    attention: SelfAttention
    x: Tensor
    rotation: AnyRotation
    segments: TokenSegments | None

    @property
    def key_values_shape(self) -> tuple[int, ...]:
        return *self.x.shape[:2], 2, self.attention._size // self.attention.head_size, self.attention.head_size

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self._empty(3)
        self.attention._project_normed(self.x, qkv, self.rotation, self.segments, ALL)
        q, k, v = head_views(qkv, 3, self.attention.head_size)
        return q, k, v

    def all_into(self, key_values: Tensor) -> Tensor:
        qkv = self._empty(3)
        self.attention._project(self.x, qkv, self.segments, ALL)
        return ProjectedHeads(qkv, self.attention._norms(), self.rotation, self.segments).all_into(key_values)

    def keys_and_values(self, out: Tensor | None = None) -> Tensor:
        out = self.x.new_empty(self.key_values_shape) if out is None else out
        self.attention._project_normed(self.x, out.flatten(2), self.rotation, self.segments, KEYS_AND_VALUES)
        return out

    def queries(self) -> Tensor:
        q = self._empty(1)
        self.attention._project_normed(self.x, q, self.rotation, self.segments, QUERIES)
        return split_heads(q, self.attention.head_size)

    def _empty(self, parts: int) -> Tensor:
        return self.x.new_empty(*self.x.shape[:2], parts * self.attention._size)


def _split(which: slice) -> tuple[slice, slice]:
    """Split a slice of (queries, keys, values) in two: queries and keys, which have norms, and values."""
    # torch.compile supports slice.indices() only from torch 2.13 on.
    first, end = which.start or 0, 3 if which.stop is None else which.stop
    return slice(first, min(end, 2)), slice(2, max(end, 2))
