"""Attention as a module of a DiT, and caches of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.kernels.attention import attention


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
