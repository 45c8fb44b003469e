"""Attention of replicated queries to keys that are sharded along the sequence.

A short segment (audio) attends to a long segment (video): each rank attends to its own keys, and all-gathers the
results, which have the length of the short segment. Shapes: B batch, L keys of this rank, H heads, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.kernels.attention import attention_with_lse, merge_attention
from models.layers.attention import Attention, KeyValueCache, PendingAttention
from models.parallel.collectives import all_gather
from models.parallel.mesh import WorkerMesh
from models.parallel.segment_lengths import SegmentScope


class ShardedKeysAttention(Attention):
    """Attention of replicated queries to the keys of all ranks; results are bit-identical on all ranks.

    A rank may have no keys. A collective call: all ranks must make it.
    """

    def __init__(self, mesh: WorkerMesh, scope: SegmentScope) -> None:
        super().__init__()
        self.axes = [axis for axis in (mesh.axis("ulysses"), mesh.axis("ring")) if axis.size > 1]
        self.scope = scope

    def finish(
        self, pending: PendingAttention, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to this rank's keys (B, L, H, K), and merge the results of all ranks in rank order. No KV cache."""
        assert cache is None, "attention to sharded keys has no KV cache"
        q, key_values = pending
        keys, values = key_values.wait()
        if keys.shape[1]:
            attended, lse = attention_with_lse(q, keys, values)
        else:
            attended, lse = torch.zeros_like(q), q.new_zeros(q.shape[:-1], dtype=torch.float32)
        attended, lse = attended[None], lse[None]
        for axis in self.axes:
            attended, lse = all_gather(attended, axis).flatten(0, 1), all_gather(lse, axis).flatten(0, 1)
        sizes = self.scope.current.sizes
        parts = [part for part, size in zip(zip(attended, lse, strict=True), sizes, strict=True) if size]
        merged, *others = parts
        for number, part in enumerate(others, 1):
            merged = merge_attention(merged, part, q.dtype if number == len(others) else torch.float32)
        return merged[0] if out is None else out.copy_(merged[0])
