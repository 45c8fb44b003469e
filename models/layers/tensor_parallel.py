"""Layers whose weights are cut between the ranks of the tp axis, after Megatron-LM (arXiv 1909.08053).

A column-parallel layer gives each rank some of its outputs, and a row-parallel layer behind it takes just these: the
pair needs one sum over the ranks. Parameters are local tensors: whatever works on an nn.Linear's weight works on
theirs. `shards` says where they lie in the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.layers.collectives import all_reduce, gather_last
from models.layers.mesh import Axis
from models.layers.norms import RMSNorm
from models.layers.shards import Shard, Sharded


class ColumnParallelLinear(Sharded, nn.Linear):
    """A linear layer of which this rank has an equal share of each segment of the outputs.

    With `gather` the outputs of all ranks are joined, in the whole layer's order: for layers that are followed by
    something that needs all of them. Such a layer can have one segment only.
    """

    def __init__(
        self, in_features: int, segments: Sequence[int], axis: Axis, *, bias: bool = True, gather: bool = False
    ) -> None:
        if gather and len(segments) > 1:
            raise ValueError(f"outputs in {len(segments)} segments cannot be gathered: they would change places")
        shard = Shard(0, axis.size, axis.index, tuple(segments))
        super().__init__(in_features, shard.size, bias=bias)
        self.shards = {"weight": shard, "bias": shard} if bias else {"weight": shard}
        self.axis = axis
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., this rank's outputs), or to all outputs."""
        result = super().forward(x)
        return gather_last(result, self.axis) if self.gather else result


class RowParallelLinear(Sharded, nn.Linear):
    """A linear layer of which this rank takes an equal share of each segment of the inputs.

    The bias is whole on every rank, and added once: to the sum, not to one of its terms.
    """

    def __init__(self, segments: Sequence[int], out_features: int, axis: Axis, *, bias: bool = True) -> None:
        shard = Shard(1, axis.size, axis.index, tuple(segments))
        super().__init__(shard.size, out_features, bias=bias)
        self.shards = {"weight": shard}
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's inputs) to (..., out_features), the same on every rank."""
        result = all_reduce(linear(x, self.weight), self.axis)
        return result if self.bias is None else result + self.bias


class ParallelRMSNorm(Sharded, RMSNorm):
    """RMSNorm over a dimension that is cut between ranks: the mean square is that of all ranks' parts."""

    def __init__(self, size: int, axis: Axis, eps: float) -> None:
        shard = Shard(0, axis.size, axis.index, (size,))
        super().__init__(shard.size, eps)
        self.shards = {"weight": shard}
        self.axis = axis
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's part) to the same. Computed in float32, result in x's type."""
        wide = x.float()
        squares = all_reduce(wide.square().sum(-1, keepdim=True), self.axis)
        return (wide * torch.rsqrt(squares / self.size + self.eps) * self.weight).to(x.dtype)
