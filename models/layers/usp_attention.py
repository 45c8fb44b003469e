"""Attention over a sequence that is cut between ranks: Ulysses' all-to-all around ring attention.

Sources: DeepSpeed-Ulysses (arXiv 2309.14509), Ring Attention (arXiv 2310.01889), their combination USP (arXiv
2405.07719). Shapes: B batch, L tokens of this rank, R tokens of its ulysses group, H heads of this rank (after tp), K
head size, U ranks on the ulysses axis.
"""

# ruff: noqa: N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

import torch
from torch import Tensor

from models.layers.attention import Attention, attention, attention_with_lse
from models.layers.collectives import start_all_to_all, start_shift, wait
from models.layers.mesh import WorkerMesh
from models.layers.shards import SequenceShards


class USPAttention(Attention):
    """Attention of this rank's queries to the keys of all ranks.

    Within a ulysses group every rank gets all tokens of the group for some of the heads, and attends; the groups' keys
    and values travel around the ring meanwhile. Keys have no order, so that a rank's tokens may be chunks of several
    streams. Chunks may have any lengths, 0 too: nothing is padded. All ranks must call it together.

    `forward` does it in one call. To overlap the all-to-all with other work, `start` each of q, k and v as soon as it
    is made, and `finish` the three.
    """

    def __init__(self, mesh: WorkerMesh, shards: SequenceShards) -> None:
        super().__init__()
        self.ulysses = mesh.axis("ulysses")
        self.ring = mesh.axis("ring")
        self.shards = shards

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, L, H, K) each."""
        return self.finish(self.start(q), self.start(k), self.start(v))

    def start(self, x: Tensor) -> Tensor:
        """Send queries, keys or values (B, L, H, K) on their way. Only `finish` can read the result."""
        ranks = self.ulysses.size
        if ranks == 1:
            return x
        batch, tokens, heads, size = x.shape
        x_ULBHK = x.view(batch, tokens, ranks, heads // ranks, size).permute(2, 1, 0, 3, 4)
        return start_all_to_all(x_ULBHK.flatten(0, 1), [tokens] * ranks, self._group(self.ring.index), self.ulysses)

    def finish(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to what `start` sent; (B, L, H, K)."""
        if self.ulysses.size == 1:
            return self._attend(q, k, v)
        attended = self._attend(*(wait(each).transpose(0, 1) for each in (q, k, v)))
        tokens, ranks = self.shards.sizes[self.shards.index], self.ulysses.size
        back = start_all_to_all(attended.transpose(0, 1), self._group(self.ring.index), [tokens] * ranks, self.ulysses)
        x_ULBHK = wait(back).view(ranks, tokens, *back.shape[1:])
        return x_ULBHK.permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _group(self, ring: int) -> list[int]:
        """Tokens of each rank of the ulysses group that has this place on the ring."""
        first = ring * self.ulysses.size
        return list(self.shards.sizes[first : first + self.ulysses.size])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, R, heads, K) to all keys, whose blocks go round; the next one travels while one is computed."""
        ranks = self.ring.size
        if ranks == 1:
            return attention(q, k, v) if q.shape[1] else q
        lengths = [sum(self._group(place)) for place in range(ranks)]
        width = 2 * k.shape[0] * k.shape[2] * k.shape[3]
        kv = torch.stack((k, v))
        merged: tuple[Tensor, Tensor] | None = None
        for step in range(ranks):
            coming = lengths[(self.ring.index - step - 1) % ranks]
            started = None
            if step + 1 < ranks:
                started = start_shift(kv.flatten(), width * coming, self.ring)
            if q.shape[1] and kv.shape[2]:
                merged = merge(merged, attention_with_lse(q, *kv.unbind()))
            if started is not None:
                kv = wait(started).view(2, kv.shape[1], coming, *kv.shape[3:])
        return q if merged is None else merged[0].to(q.dtype)


def merge(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to the keys of both, from attention to each: results (B, R, H, K) and their log-sum-exp (B, R, H).

    Computed in float32, which the result is; None is attention to nothing.
    """
    out, lse = other[0].float(), other[1]
    if one is None:
        return out, lse
    total = torch.logaddexp(one[1], lse)
    return one[0] * (one[1] - total).exp()[..., None] + out * (lse - total).exp()[..., None], total
