"""Attention over a sequence that is sharded between ranks: Ulysses' all-to-all around ring attention.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), their combination USP (arXiv
2405.07719). Shapes: B batch, L tokens of this rank, R tokens of its ulysses group, H heads of this rank (after tp), K
head size, U ranks on the ulysses axis.
"""

# ruff: noqa: N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.attention import attention, attention_with_lse, merge_attention
from models.layers.attention import (
    Attention,
    KeyValueCache,
    KeyValues,
    PendingAttention,
    Projection,
    SeparableProjection,
)
from models.parallel.collectives import start_all_to_all, start_shift, wait
from models.parallel.mesh import Axis, WorkerMesh
from models.parallel.peer_gather import Gathered, PeerGather
from models.parallel.segment_lengths import SegmentScope


class USPAttention(Attention):
    """Attention of this rank's queries to the keys of all ranks.

    Within a ulysses group every rank gets all tokens of the group for some of the heads, and attends. The groups' keys
    and values travel around the ring meanwhile, or are gathered before where all ranks can write to each other's
    memory. Keys have no order, so that a rank's tokens may be chunks of several segments. Chunks may have any lengths,
    0 too: nothing is padded. All ranks must call it together.
    """

    def __init__(self, mesh: WorkerMesh, scope: SegmentScope, gather: PeerGather | None = None) -> None:
        super().__init__()
        self.ulysses = mesh.axis("ulysses")
        self.ring = mesh.axis("ring")
        self.scope = scope
        self.gather = gather

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, L, H, K) each."""
        sent = self._send(k, v)
        return self.finish(PendingAttention(self._start_queries(q), sent))

    def attend(self, projection: SeparableProjection, cache: KeyValueCache | None = None) -> Tensor:
        """The same for what is still to be projected: keys and values travel while the queries are projected."""
        gathered = self._gathered(projection) if self.ulysses.size == 1 else None
        if gathered is None:
            sent = self._send(*projection.keys_and_values().unbind(2))
        else:
            projection.keys_and_values(gathered.buffer)
            gathered.send()
            sent = gathered
        return self.finish(PendingAttention(self._start_queries(projection.queries()), sent), cache=cache)

    def start(self, projection: Projection) -> PendingAttention:
        """Project all in one GEMM and send it: the model has something else to compute meanwhile."""
        gathered = self._gathered(projection) if self.ulysses.size == 1 else None
        if gathered is None:
            q, k, v = projection.all()
            sent = self._send(k, v)
        else:
            q = projection.all_into(gathered.buffer)
            gathered.send()
            sent = gathered
        return PendingAttention(self._start_queries(q), sent)

    def cached_heads(self, heads: int) -> int:
        """A cache holds all tokens of the group, of the heads that this rank attends with."""
        return heads // self.ulysses.size

    def finish(
        self, started: PendingAttention, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to what was started; (B, L, H, K). On a ring there is no cache."""
        assert cache is None or self.ring.size == 1, "the loader of a causal model refuses a ring"
        if self.ulysses.size == 1:
            return self._attend(started.queries, started.key_values, out)
        keys, values = started.key_values.wait()
        if cache is not None:
            keys, values = cache.extended(keys, values)
        in_ring = self._send_in_ring(keys, values)
        attended = self._gather_heads(self._attend(wait(started.queries).transpose(0, 1), in_ring, None))
        return attended if out is None else out.copy_(attended)

    def _start_queries(self, q: Tensor) -> Tensor:
        """Send queries (B, L, H, K) to the ranks that have their heads. On a ring they stay."""
        return q if self.ulysses.size == 1 else self.scatter_heads(q)

    def _send(self, k: Tensor, v: Tensor) -> KeyValues:
        """Send keys and values (B, L, H, K) to the ranks that have their heads, or to the others of the ring."""
        return self._send_in_ring(k, v) if self.ulysses.size == 1 else _ScatteredHeads(k, v, self)

    def scatter_heads(self, x: Tensor) -> Tensor:
        """Begin to give each rank of the group its heads of x (B, L, H, K); (R, B, heads, K) will arrive."""
        batch, tokens, heads, size = x.shape
        ranks = self.ulysses.size
        x_ULBHK = x.view(batch, tokens, ranks, heads // ranks, size).permute(2, 1, 0, 3, 4)
        return start_all_to_all(x_ULBHK.flatten(0, 1), [tokens] * ranks, self._group(self.ring.index), self.ulysses)

    def _gather_heads(self, attended: Tensor) -> Tensor:
        """All tokens of the group for some heads (B, R, heads, K) to this rank's tokens for all (B, L, H, K)."""
        lengths, ranks = self.scope.current, self.ulysses.size
        tokens = lengths.sizes[lengths.index]
        sent = self._group(self.ring.index)
        x_LBHK = wait(start_all_to_all(attended.transpose(0, 1), sent, [tokens] * ranks, self.ulysses))
        return x_LBHK.view(ranks, tokens, *x_LBHK.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _group(self, ring: int) -> list[int]:
        """Tokens of each rank of the ulysses group that has this place on the ring."""
        first = ring * self.ulysses.size
        return list(self.scope.current.sizes[first : first + self.ulysses.size])

    def _send_in_ring(self, k: Tensor, v: Tensor) -> KeyValues:
        """Send keys and values (B, R, heads, K) of one group to the others."""
        gather = self._gather()
        if gather is not None:
            batch, tokens, heads, size = k.shape
            gathered = gather.key_values((batch, tokens, 2, heads, size), k.dtype, self._blocks())
            for part, tensor in zip(gathered.buffer.unbind(2), (k, v), strict=True):
                part.copy_(tensor)
            gathered.send()
            return gathered
        return KeyValues(k, v) if self.ring.size == 1 else _RingBlocks(k, v, self.ring, self._blocks())

    def _gathered(self, projection: Projection) -> Gathered | None:
        """Where the projection can write keys and values for all ranks of the ring, if these share memory."""
        gather = self._gather()
        if gather is None:
            return None
        return gather.key_values(projection.key_values_shape, projection.dtype, self._blocks())

    def _gather(self) -> PeerGather | None:
        """Writing to other ranks' memory is nothing that a compiler could trace."""
        return None if torch.compiler.is_compiling() else self.gather

    def _blocks(self) -> list[int]:
        """Tokens of each group of the ring."""
        return [sum(self._group(index)) for index in range(self.ring.size)]

    def _attend(self, q: Tensor, sent: KeyValues, out: Tensor | None) -> Tensor:
        """Queries (B, R, heads, K) to all keys."""
        if isinstance(sent, _RingBlocks | Gathered):
            return sent.attend(q, out)
        keys, values = sent.wait()
        if q.shape[1]:
            return attention(q, keys, values, out=out)
        return q if out is None else out


class _ScatteredHeads(KeyValues):
    """Keys and values on their way to the ranks of a ulysses group that have their heads."""

    def __init__(self, k: Tensor, v: Tensor, attention: USPAttention) -> None:
        v, k = (attention.scatter_heads(each) for each in (v, k))
        super().__init__(k, v)

    def wait(self) -> tuple[Tensor, Tensor]:
        keys, values = (wait(each).transpose(0, 1) for each in (self.k, self.v))
        return keys, values


class _RingBlocks(KeyValues):
    """Keys and values (B, R, heads, K) that go around a ring: one block travels while the one before is computed.

    `sizes` are the tokens of the ranks' blocks.
    """

    def __init__(self, k: Tensor, v: Tensor, ring: Axis, sizes: Sequence[int]) -> None:
        super().__init__(k, v)
        self._ring = ring
        self._sizes = sizes
        self._next: list[Tensor] = []
        self._start_exchange(0)

    def attend(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Queries (B, R, heads, K) to all blocks."""
        last = max(step for step in range(self._ring.size) if self._block(step))
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(self._ring.size):
            if q.shape[1] and self._block(step):
                part = attention_with_lse(q, self.k, self.v)
                merged = merge_attention(merged, part, q.dtype if step == last else torch.float32) if merged else part
            if step + 1 < self._ring.size:
                shape = (self.k.shape[0], self._block(step + 1), *self.k.shape[2:])
                self.v, self.k = (wait(each).view(shape) for each in self._next)
                self._start_exchange(step + 1)
        attended = q if merged is None else merged[0]
        return attended if out is None else out.copy_(attended)

    def _block(self, step: int) -> int:
        """Tokens of the block of keys that is here at a step of the ring; at step 0 it is this rank's own."""
        return self._sizes[(self._ring.index - step) % self._ring.size]

    def _start_exchange(self, step: int) -> None:
        """Begin to exchange a step's block for the next one; nothing after the last step."""
        if step + 1 < self._ring.size:
            row = self.k.shape[0] * self.k.shape[2] * self.k.shape[3]
            received = row * self._block(step + 1)
            self._next = [start_shift(each.flatten(), received, self._ring) for each in (self.v, self.k)]
