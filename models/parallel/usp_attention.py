"""Attention over a sequence that is sharded between ranks: ring attention between Ulysses groups.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), and their combination USP
(arXiv 2405.07719). Shapes: B batch, L tokens of this rank, R tokens of its ulysses group, H heads of this rank (after
tp), K head size, U ranks on the ulysses axis.
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

    An all-to-all within the ulysses group gives each rank all tokens of the group for some of the heads. Keys and
    values of the groups are then exchanged along the ring, in steps that overlap with attention; where all ranks can
    write to each other's memory, keys and values are gathered instead. Attention does not depend on the order of keys,
    so that a rank's tokens may be chunks of several segments. Chunks may have any length, including 0, and are not
    padded. A collective call: all ranks must make it.
    """

    def __init__(self, mesh: WorkerMesh, scope: SegmentScope, gather: PeerGather | None = None) -> None:
        super().__init__()
        self.ulysses = mesh.axis("ulysses")
        self.ring = mesh.axis("ring")
        self.scope = scope
        self.gather = gather

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries, keys and values (B, L, H, K)."""
        sent = self._send(k, v)
        return self.finish(PendingAttention(self._start_queries(q), sent))

    def attend(self, projection: SeparableProjection, cache: KeyValueCache | None = None) -> Tensor:
        """Project and attend; the GEMM of the queries overlaps with the transfer of keys and values."""
        gathered = self._gathered(projection) if self.ulysses.size == 1 else None
        if gathered is None:
            sent = self._send(*projection.keys_and_values().unbind(2))
        else:
            projection.keys_and_values(gathered.buffer)
            gathered.send()
            sent = gathered
        return self.finish(PendingAttention(self._start_queries(projection.queries()), sent), cache=cache)

    def start(self, projection: Projection) -> PendingAttention:
        """Project queries, keys and values by one GEMM, and start their transfer."""
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
        """Number of heads per rank after the all-to-all. A KV cache holds all tokens of the group for these heads."""
        return heads // self.ulysses.size

    def finish(
        self, pending: PendingAttention, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Complete the attention call; returns (B, L, H, K). KV caches are not supported on a ring."""
        assert cache is None or self.ring.size == 1, "check_parallel() rejects a ring for models with a KV cache"
        if self.ulysses.size == 1:
            return self._attend(pending.queries, pending.key_values, out)
        keys, values = pending.key_values.wait()
        if cache is not None:
            keys, values = cache.update(keys, values)
        in_ring = self._send_in_ring(keys, values)
        attended = self._gather_heads(self._attend(wait(pending.queries).transpose(0, 1), in_ring, None))
        return attended if out is None else out.copy_(attended)

    def _start_queries(self, q: Tensor) -> Tensor:
        """Start the all-to-all of queries (B, L, H, K) within the ulysses group. The ring does not move queries."""
        return q if self.ulysses.size == 1 else self.scatter_heads(q)

    def _send(self, k: Tensor, v: Tensor) -> KeyValues:
        """Start the transfer of keys and values (B, L, H, K), within the ulysses group or along the ring."""
        return self._send_in_ring(k, v) if self.ulysses.size == 1 else _ScatteredHeads(k, v, self)

    def scatter_heads(self, x: Tensor) -> Tensor:
        """Start an all-to-all of x (B, L, H, K) that gives each rank of the group its heads: (R, B, heads, K)."""
        batch, tokens, heads, size = x.shape
        ranks = self.ulysses.size
        x_ULBHK = x.view(batch, tokens, ranks, heads // ranks, size).permute(2, 1, 0, 3, 4)
        return start_all_to_all(x_ULBHK.flatten(0, 1), [tokens] * ranks, self._group(self.ring.index), self.ulysses)

    def _gather_heads(self, attended: Tensor) -> Tensor:
        """All-to-all from the group's tokens for some heads (B, R, heads, K) to own tokens (B, L, H, K)."""
        lengths, ranks = self.scope.current, self.ulysses.size
        tokens = lengths.sizes[lengths.index]
        sent = self._group(self.ring.index)
        x_LBHK = wait(start_all_to_all(attended.transpose(0, 1), sent, [tokens] * ranks, self.ulysses))
        return x_LBHK.view(ranks, tokens, *x_LBHK.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _group(self, ring: int) -> list[int]:
        """Number of tokens on each rank of the ulysses group with index `ring` on the ring."""
        first = ring * self.ulysses.size
        return list(self.scope.current.sizes[first : first + self.ulysses.size])

    def _send_in_ring(self, k: Tensor, v: Tensor) -> KeyValues:
        """Start the transfer of keys and values (B, R, heads, K) of this group to the other groups."""
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
        """Peer buffer for the projected keys and values; None without shared memory, or under torch.compile."""
        gather = self._gather()
        if gather is None:
            return None
        return gather.key_values(projection.key_values_shape, projection.dtype, self._blocks())

    def _gather(self) -> PeerGather | None:
        # torch.compile cannot trace writes to the memory of other ranks.
        return None if torch.compiler.is_compiling() else self.gather

    def _blocks(self) -> list[int]:
        """Number of tokens of each group of the ring."""
        return [sum(self._group(index)) for index in range(self.ring.size)]

    def _attend(self, q: Tensor, sent: KeyValues, out: Tensor | None) -> Tensor:
        """Attention of queries (B, R, heads, K) to the keys of all groups."""
        if isinstance(sent, _RingBlocks | Gathered):
            return sent.attend(q, out)
        keys, values = sent.wait()
        if q.shape[1]:
            return attention(q, keys, values, out=out)
        return q if out is None else out


class _ScatteredHeads(KeyValues):
    """Keys and values in a pending all-to-all of heads within a ulysses group."""

    def __init__(self, k: Tensor, v: Tensor, layer: USPAttention) -> None:
        v, k = (layer.scatter_heads(each) for each in (v, k))
        super().__init__(k, v)

    def wait(self) -> tuple[Tensor, Tensor]:
        keys, values = (wait(each).transpose(0, 1) for each in (self.k, self.v))
        return keys, values


class _RingBlocks(KeyValues):
    """Keys and values (B, R, heads, K) in ring attention. Attention overlaps with the transfer of the next block.

    `sizes` are the numbers of tokens of the ranks' blocks.
    """

    def __init__(self, k: Tensor, v: Tensor, ring: Axis, sizes: Sequence[int]) -> None:
        super().__init__(k, v)
        self._ring = ring
        self._sizes = sizes
        self._next: list[Tensor] = []
        self._start_exchange(0)

    def attend(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of queries (B, R, heads, K) to all blocks."""
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
        """Number of tokens of the block that this rank holds in a step of the ring; its own block in step 0."""
        return self._sizes[(self._ring.index - step) % self._ring.size]

    def _start_exchange(self, step: int) -> None:
        """Start to send the block of a step and to receive the next one. Does nothing in the last step."""
        if step + 1 < self._ring.size:
            row = self.k.shape[0] * self.k.shape[2] * self.k.shape[3]
            received = row * self._block(step + 1)
            self._next = [start_shift(each.flatten(), received, self._ring) for each in (self.v, self.k)]
