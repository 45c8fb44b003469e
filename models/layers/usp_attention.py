"""Attention over a sequence that is cut between ranks: Ulysses' all-to-all around ring attention.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), their combination USP (arXiv
2405.07719). Shapes: B batch, L tokens of this rank, R tokens of its ulysses group, H heads of this rank (after tp), K
head size, U ranks on the ulysses axis.
"""

# ruff: noqa: N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

import torch
from torch import Tensor

from models.layers.attention import Attention, InFlight, attention, attention_with_lse
from models.layers.backend import kernels_for
from models.layers.collectives import start_all_to_all, start_shift, wait
from models.layers.mesh import WorkerMesh
from models.layers.shards import SequenceShards


class USPAttention(Attention):
    """Attention of this rank's queries to the keys of all ranks.

    Within a ulysses group every rank gets all tokens of the group for some of the heads, and attends; the groups' keys
    and values travel around the ring meanwhile. Keys have no order, so that a rank's tokens may be chunks of several
    streams. Chunks may have any lengths, 0 too: nothing is padded. All ranks must call it together.
    """

    def __init__(self, mesh: WorkerMesh, shards: SequenceShards) -> None:
        super().__init__()
        self.ulysses = mesh.axis("ulysses")
        self.ring = mesh.axis("ring")
        self.shards = shards

    def start_queries(self, x: Tensor) -> InFlight:
        """Send queries (B, L, H, K) to the ranks that have their heads. On a ring they stay."""
        return (x,) if self.ulysses.size == 1 else (self._share_heads(x),)

    def start_keys(self, x: Tensor) -> InFlight:
        """Send keys or values (B, L, H, K) to the ranks that have their heads, or to the next one of the ring."""
        if self.ulysses.size == 1:
            return (x, *self._pass_on(x, 0))
        return (self._share_heads(x),)

    def finish(self, q: InFlight, k: InFlight, v: InFlight) -> Tensor:
        """Attend to what was started; (B, L, H, K)."""
        if self.ulysses.size == 1:
            return self._attend(q[0], k, v)
        queries, keys, values = (wait(each).transpose(0, 1) for (each,) in (q, k, v))
        attended = self._attend(queries, (keys, *self._pass_on(keys, 0)), (values, *self._pass_on(values, 0)))
        return self._give_back(attended)

    def _share_heads(self, x: Tensor) -> Tensor:
        """Begin to give each rank of the group its heads of x (B, L, H, K); (R, B, heads, K) will arrive."""
        batch, tokens, heads, size = x.shape
        ranks = self.ulysses.size
        x_ULBHK = x.view(batch, tokens, ranks, heads // ranks, size).permute(2, 1, 0, 3, 4)
        return start_all_to_all(x_ULBHK.flatten(0, 1), [tokens] * ranks, self._group(self.ring.index), self.ulysses)

    def _give_back(self, attended: Tensor) -> Tensor:
        """All tokens of the group for some heads (B, R, heads, K) to this rank's tokens for all (B, L, H, K)."""
        tokens, ranks = self.shards.sizes[self.shards.index], self.ulysses.size
        sent = self._group(self.ring.index)
        x_LBHK = wait(start_all_to_all(attended.transpose(0, 1), sent, [tokens] * ranks, self.ulysses))
        return x_LBHK.view(ranks, tokens, *x_LBHK.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _group(self, ring: int) -> list[int]:
        """Tokens of each rank of the ulysses group that has this place on the ring."""
        first = ring * self.ulysses.size
        return list(self.shards.sizes[first : first + self.ulysses.size])

    def _block(self, step: int) -> int:
        """Tokens of the block of keys that is here at a step of the ring; at step 0 it is this rank's own."""
        return sum(self._group((self.ring.index - step) % self.ring.size))

    def _pass_on(self, x: Tensor, step: int) -> InFlight:
        """Begin to exchange a step's block (B, tokens, heads, K) for the next one; nothing after the last step."""
        if step + 1 == self.ring.size:
            return ()
        row = x.shape[0] * x.shape[2] * x.shape[3]
        return (start_shift(x.flatten(), row * self._block(step + 1), self.ring),)

    def _attend(self, q: Tensor, k: InFlight, v: InFlight) -> Tensor:
        """Queries (B, R, heads, K) to all keys, whose blocks go round: one travels while the one before is computed."""
        if self.ring.size == 1:
            return attention(q, *k, *v) if q.shape[1] else q
        last = max(step for step in range(self.ring.size) if self._block(step))
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(self.ring.size):
            if q.shape[1] and self._block(step):
                part = attention_with_lse(q, k[0], v[0])
                merged = merge(merged, part, q.dtype if step == last else torch.float32) if merged else part
            if step + 1 < self.ring.size:
                shape = (k[0].shape[0], self._block(step + 1), *k[0].shape[2:])
                blocks = [wait(each[1]).view(shape) for each in (k, v)]
                k, v = ((block, *self._pass_on(block, step + 1)) for block in blocks)
        return q if merged is None else merged[0]


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both, from attention to each: results (B, R, H, K) and their log-sum-exp (B, R, H).

    Computed in float32; the result is in `dtype`, its log-sum-exp in float32.
    """
    if (kernels := kernels_for(one[0])) is not None:
        both: tuple[Tensor, Tensor] = kernels.merge_attention(one, other, dtype)
        return both
    total = torch.logaddexp(one[1], other[1])
    parts = [out.float() * (lse - total).exp()[..., None] for out, lse in (one, other)]
    return (parts[0] + parts[1]).to(dtype), total
