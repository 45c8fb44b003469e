"""Self-attention of DiTs, up to the projection of its result. Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, S tokens, D hidden size (of this rank, after tp), K head size.
"""

# ruff: noqa: N803  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.kernels.gemm import can_norm_rotate, has_heads, multiply_norm_rotate_into
from models.kernels.qk_norm_rotate import AnyRotation, split_heads
from models.layers.attention import Attention, KeyValueCache, KeyValues
from models.layers.linear import ALL, JoinedLinear, JoinsWeights, Linear, project
from models.layers.norms import QKNorm, RMSNorm
from models.layers.qk_norm import HeadNorms, apply_qk_norm, in_place
from models.rotation import Rotation
from models.token_segments import TokenSegments

QUERIES, KEYS_AND_VALUES = slice(0, 1), slice(1, 3)


class Started(NamedTuple):
    """Queries, keys and values on their way."""

    queries: Tensor
    key_values: KeyValues


class SelfAttention(JoinsWeights):
    """Tokens attend to each other; queries and keys are normalised, then turned to their positions.

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
        """Make one product of the three projections, once the weights are in place."""
        self.joined = JoinedLinear(self._projections)
        norms = [norm for norm in (self.norm_q, self.norm_k) if isinstance(norm, RMSNorm)]
        if norms and all(has_heads(self.head_size, norm.size, norm.eps) for norm in norms):
            heads = self._size // self.head_size
            self.scales = torch.stack([norm.weight.data.repeat(heads) for norm in norms])

    def start(
        self, x_BSD: Tensor, rotation: AnyRotation, segments: TokenSegments | None = None, *, keys_first: bool = False
    ) -> Started:
        """Project and begin to attend: what is computed before finish() overlaps with what ranks send each other.

        Where nothing is, `keys_first` lets at least the queries' projection do so, in a product of its own. `segments`
        are those with weights of their own.
        """
        if keys_first and self.inner.travels:
            return self._start_keys_first(x_BSD, rotation, segments)
        qkv = self._empty(x_BSD, 3)
        q, k, v = in_place(qkv, 3, self.head_size)
        key_values = self.inner.key_values(k, v)
        if key_values.room is None:
            self._project_normed(x_BSD, qkv, rotation, segments, ALL)
        else:
            self._project(x_BSD, qkv, segments, ALL)
            apply_qk_norm(qkv, self._norms(), rotation, segments, out=(q, *key_values.room.unbind(2)))
        key_values.send()
        return Started(self.inner.start_queries(q), key_values)

    def _start_keys_first(self, x_BSD: Tensor, rotation: AnyRotation, segments: TokenSegments | None) -> Started:
        heads = self._size // self.head_size
        key_values = self.inner.new_key_values(x_BSD, (*x_BSD.shape[:2], 2, heads, self.head_size))
        assert key_values.room is not None, "there is room for what is new"
        self._project_normed(x_BSD, key_values.room.flatten(2), rotation, segments, KEYS_AND_VALUES)
        key_values.send()
        q = self._empty(x_BSD, 1)
        self._project_normed(x_BSD, q, rotation, segments, QUERIES)
        return Started(self.inner.start_queries(split_heads(q, self.head_size)), key_values)

    def _empty(self, x_BSD: Tensor, parts: int) -> Tensor:
        return x_BSD.new_empty(*x_BSD.shape[:2], parts * self._size)

    def finish(self, started: Started, out: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """(B, S, D), in `out` if given; attends to the tokens in the cache, too."""
        heads = None if out is None else split_heads(out, self.head_size)
        attended: Tensor = self.inner.finish(*started, heads, cache)
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
        """The same, with queries and keys normalised and turned."""
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
        """Where _can_fuse(): queries and keys in one product, values in another."""
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


def _split(which: slice) -> tuple[slice, slice]:
    """Some of queries, keys and values: which of them are normalised, and which are not."""
    # Not by indices(), which a compiler does not know before torch 2.13.
    first, end = which.start or 0, 3 if which.stop is None else which.stop
    return slice(first, min(end, 2)), slice(2, max(end, 2))
