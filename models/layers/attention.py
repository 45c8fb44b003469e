"""Attention as a module of a DiT, and caches of keys and values."""

from __future__ import annotations

from dataclasses import dataclass

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


class KeyValues:
    """Keys and values (B, L, H, K) on their way to attention. A parallel form sends them to other ranks.

    `room` is where they are to be written before they are sent, if they are not to be sent from where they are: keys
    and values of each token behind each other, (B, L, 2, H, K).
    """

    room: Tensor | None = None

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def take(self, k: Tensor, v: Tensor) -> None:
        """Send these."""
        if self.room is not None:
            for room, tensor in zip(self.room.unbind(2), (k, v), strict=True):
                room.copy_(tensor)
        self.send()

    def send(self) -> None:
        """Begin to send them, once they are written. What is computed next overlaps with it."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks, once they are there."""
        return self.k, self.v


class Attention(nn.Module):
    """attention() as a module, so that a parallel form can take its place in a model.

    A parallel form sends tensors to other ranks: a model that has something else to compute meanwhile starts queries,
    keys and values as soon as they are made, and finishes later.
    """

    travels = False
    """Whether keys and values are sent anywhere, so that it pays to make them first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, tokens, heads, head size) each."""
        sent = self.key_values(k, v)
        sent.take(k, v)
        return self.finish(self.start_queries(q), sent)

    def key_values(self, k: Tensor, v: Tensor) -> KeyValues:
        """A way for keys and values of these shapes, which may still have to be written."""
        return KeyValues(k, v)

    def new_key_values(self, like: Tensor, shape: tuple[int, ...]) -> KeyValues:
        """The same with room (B, L, 2, H, K) for some that are nowhere yet, in the type of `like`."""
        room = like.new_empty(shape)
        made = self.key_values(*room.unbind(2))
        made.room = room
        return made

    def start_queries(self, x: Tensor) -> Tensor:
        """Send queries on their way: only finish() can read what it returns."""
        return x

    def cached_heads(self, heads: int) -> int:
        """Of `heads` heads of this rank, those whose keys and values a cache on this rank holds."""
        return heads

    def finish(
        self, q: Tensor, sent: KeyValues, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to what was started, and to the tokens in the cache; into `out`, if given."""
        keys, values = sent.wait()
        if cache is not None:
            keys, values = cache.extended(keys, values)
        return attention(q, keys, values, out=out)
