"""Attention of DiTs, and self-attention up to the projection of its result. Names are those of Diffusers' checkpoints.

Shapes: B batch, S tokens, L tokens of this rank, D hidden size and H heads of this rank, K head size.
"""

# ruff: noqa: N803  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.kernels.attention import attention
from models.kernels.gemm import can_norm_rotate, has_heads, multiply_norm_rotate_into
from models.kernels.qk_norm_rotate import AnyRotation, split_heads
from models.layers.linear import ALL, JoinedLinear, JoinsWeights, Linear, project
from models.layers.norms import QKNorm, RMSNorm
from models.layers.qk_norm import HeadNorms, ProjectedHeads, apply_qk_norm, in_place
from models.rotation import Rotation
from models.token_segments import TokenSegments

QUERIES, KEYS_AND_VALUES = slice(0, 1), slice(1, 3)


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of earlier tokens, to which those of the current tokens are added in place.

    `slab` is (2, B, capacity, H, K): keys, then values. `slots` are where the current tokens go, in their order, and
    `length` is the number of tokens that are valid then, from the first on. Keys have no order in attention: a slot may
    be that of a token that left the window.
    """

    slab: Tensor
    slots: tuple[slice, ...]
    length: int

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, tokens, H, K) to the slots; all valid ones (B, length, H, K), in the slab."""
        keys, values = self.slab.unbind()
        begin = 0
        for slot in self.slots:
            end = begin + slot.stop - slot.start
            keys[:, slot].copy_(k[:, begin:end])
            values[:, slot].copy_(v[:, begin:end])
            begin = end
        return keys[:, : self.length], values[:, : self.length]


class Projection(Protocol):
    """Queries, keys and values (B, L, H, K) of tokens, which attention has projected where it needs them."""

    @property
    def key_values_shape(self) -> tuple[int, ...]:
        """(B, L, 2, H, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of what is projected."""

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, in one GEMM."""

    def all_into(self, key_values: Tensor) -> Tensor:
        """The queries, in one GEMM with keys and values, which are written to `key_values` (B, L, 2, H, K)."""


class SeparableProjection(Projection, Protocol):
    """A projection whose queries may have a GEMM of their own."""

    def keys_and_values(self, out: Tensor | None = None) -> Tensor:
        """Keys and values (B, L, 2, H, K), in `out` if given."""

    def queries(self) -> Tensor:
        """The queries alone."""


class KeyValues:
    """Keys and values (B, L, H, K) to attend to. In a parallel form they are on their way between ranks."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks, once they are there."""
        return self.k, self.v


class Started(NamedTuple):
    """Queries, keys and values on their way: only finish() can read them."""

    queries: Tensor
    key_values: KeyValues


class Attention(nn.Module):
    """attention() as a module, so that a parallel form can take its place in a model.

    A parallel form sends tensors to other ranks: a model that has something else to compute meanwhile starts, computes
    that, and finishes. Any other model attends at once.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, tokens, heads, head size) each."""
        return self.finish(Started(q, KeyValues(k, v)))

    def attend(self, projection: SeparableProjection, cache: KeyValueCache | None = None) -> Tensor:
        """Project and attend, also to the tokens in the cache, with nothing else to compute; (B, L, H, K)."""
        return self.finish(self.start(projection), cache=cache)

    def start(self, projection: Projection) -> Started:
        """Project all in one GEMM, and begin to attend."""
        q, k, v = projection.all()
        return Started(q, KeyValues(k, v))

    def cached_heads(self, heads: int) -> int:
        """Of `heads` heads of this rank, those whose keys and values a cache on this rank holds."""
        return heads

    def finish(self, started: Started, out: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Attend to what was started, and to the tokens in the cache; into `out`, if given."""
        keys, values = started.key_values.wait()
        if cache is not None:
            keys, values = cache.extended(keys, values)
        return attention(started.queries, keys, values, out=out)


class SelfAttention(JoinsWeights):
    """Tokens attend to each other; queries and keys are normalised, then rotated to their positions.

    The norms are over each head, or over all heads together if they are as wide. The block projects the result.
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
        # Of queries and of keys (2, D), where each head is normalised by itself.
        self.scales: Tensor | None = None

    def join_weights(self) -> None:
        """Join the three projections into one GEMM, once the weights are in place."""
        self.joined = JoinedLinear(self._projections)
        norms = [norm for norm in (self.norm_q, self.norm_k) if isinstance(norm, RMSNorm)]
        if norms and all(has_heads(self.head_size, norm.size, norm.eps) for norm in norms):
            heads = self._size // self.head_size
            self.scales = torch.stack([norm.weight.data.repeat(heads) for norm in norms])

    def forward(
        self,
        x_BSD: Tensor,
        rotation: AnyRotation,
        segments: TokenSegments | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, S, D), of a block with nothing to compute meanwhile; attends to the tokens in the cache, too.

        `segments` are those with weights of their own.
        """
        return self.inner.attend(_HeadProjection(self, x_BSD, rotation, segments), cache).flatten(2)

    def start(self, x_BSD: Tensor, rotation: AnyRotation, segments: TokenSegments | None = None) -> Started:
        """Project and begin to attend: computation before finish() overlaps with messages between ranks."""
        return self.inner.start(_HeadProjection(self, x_BSD, rotation, segments))

    def finish(self, started: Started, out: Tensor | None = None) -> Tensor:
        """(B, S, D), in `out` if given."""
        heads = None if out is None else split_heads(out, self.head_size)
        attended = self.inner.finish(started, heads)
        return attended.flatten(2) if out is None else out

    @property
    def cached_heads(self) -> int:
        """The heads whose keys and values a cache on this rank holds."""
        return self.inner.cached_heads(self._size // self.head_size)

    @property
    def _projections(self) -> tuple[Linear, ...]:
        return self.to_q, self.to_k, self.to_v

    def _project(self, x_BSD: Tensor, out: Tensor, segments: TokenSegments | None, which: slice) -> None:
        """Write queries, keys and values, or some of them, side by side."""
        del segments  # All tokens have the same projections.
        project(x_BSD, out, self.joined, self._projections, which)

    def _project_normed(
        self, x_BSD: Tensor, out: Tensor, rotation: AnyRotation, segments: TokenSegments | None, which: slice
    ) -> None:
        """The same, with queries and keys normalised and rotated."""
        if isinstance(rotation, Rotation) and self._can_fuse(x_BSD, out):
            self._write_normed(x_BSD, out, rotation.interleaved, which)
        else:
            self._project(x_BSD, out, segments, which)
            self._normalise(out, rotation, segments, which)

    def _normalise(self, out: Tensor, rotation: AnyRotation, segments: TokenSegments | None, which: slice) -> None:
        """What was projected, in place."""
        normed, _ = _split(which)
        width = self._size * len(self._projections[normed])
        apply_qk_norm(out[..., :width], self._norms().of(normed), rotation, segments)

    def _can_fuse(self, x: Tensor, out: Tensor) -> bool:
        """Whether GEMM of x (B, tokens, D) can normalise and rotate the heads in its epilogue."""
        if self.joined is None or self.joined.weight.scale is not None or self.scales is None:
            return False
        return can_norm_rotate(x, self.joined.weight, out)

    def _write_normed(self, x: Tensor, out: Tensor, angles: Tensor, which: slice) -> None:
        """Where _can_fuse(): queries and keys in one GEMM, values in another."""
        assert self.joined is not None, "weights are not joined"
        assert self.scales is not None, "norms are not over each head"
        normed, values = _split(which)
        weight, bias = self.joined.of(normed)
        scale = self.scales[normed].flatten()
        multiply_norm_rotate_into(x, weight, bias, scale, angles, out[..., : len(bias)])
        if self._projections[values]:
            self.joined.into(x, out[..., len(bias) :], values)

    @property
    def _size(self) -> int:
        """Of the queries of all heads that this rank has."""
        return len(self.to_q.weight)

    def _norms(self) -> HeadNorms:
        return HeadNorms((self.norm_q, self.norm_k), self.head_size)


@dataclass(frozen=True)
class _HeadProjection:
    """The projections of a SelfAttention, for tokens x (B, S, D)."""

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
        q, k, v = in_place(qkv, 3, self.attention.head_size)
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
    """Some of queries, keys and values: which of them are normalised, and which are not."""
    # Not by indices(), which a compiler does not know before torch 2.13.
    first, end = which.start or 0, 3 if which.stop is None else which.stop
    return slice(first, min(end, 2)), slice(2, max(end, 2))
