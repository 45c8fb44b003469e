"""Tensor-parallel layers: weights are sharded on the tp axis, as in Megatron-LM (arXiv 1909.08053).

A column-parallel layer shards its outputs, and the row-parallel layer after it shards its inputs in the same way: the
pair needs a single all-reduce. Parameters are plain local tensors, so that all operations on a Linear's weight, such as
quantization, apply to them. `shards` locates them in the checkpoint's tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.activation import write_gelu
from models.kernels.gemm import multiply
from models.layers.head_rotary import SelectHeads
from models.layers.linear import Linear
from models.layers.norms import Residual, RMSNorm
from models.parallel.collectives import all_reduce, gather_last
from models.parallel.mesh import Axis
from models.parallel.shards import Shard, Sharded
from models.token_segments import SegmentVectors


class ColumnParallelLinear(Sharded, Linear):
    """Linear layer with sharded outputs: each rank has an equal chunk of each part of the outputs.

    With `gather`, forward() all-gathers the outputs of all ranks. Raises ValueError for `gather` with several parts:
    the gathered outputs would not be in the order of the whole layer.
    """

    def __init__(self, in_features: int, parts: Sequence[int], axis: Axis, *, gather: bool = False) -> None:
        if gather and len(parts) > 1:
            raise ValueError(f"outputs in {len(parts)} parts cannot be gathered in the layer's order; use one part")
        shard = Shard(0, axis.size, axis.index, tuple(parts))
        super().__init__(in_features, shard.size)
        self.shards = {"weight": shard, "bias": shard}
        self.axis = axis
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., this rank's outputs), or to (..., all outputs) with `gather`."""
        result = super().forward(x)
        return gather_last(result, self.axis) if self.gather else result


class RowParallelLinear(Sharded, Linear):
    """Linear layer with sharded inputs: each rank has an equal chunk of each part of the inputs.

    The bias is replicated, and added once, after the all-reduce.
    """

    def __init__(self, parts: Sequence[int], out_features: int, axis: Axis) -> None:
        shard = Shard(1, axis.size, axis.index, tuple(parts))
        super().__init__(shard.size, out_features)
        self.shards = {"weight": shard}
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """(..., this rank's inputs) to (..., out_features), the same on every rank."""
        return self._sum(x) + self.bias

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result for this rank's inputs (B, tokens, inputs) to `out` (B, tokens, out_features)."""
        torch.add(self._sum(x), self.bias, out=out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """Write GELU (tanh approximation) of the result of into() to `out`."""
        write_gelu(self(x), out)

    def add_gated(self, x: Tensor, inputs: Tensor, gate: SegmentVectors) -> Residual:
        """x with a pending update, gate * self(inputs): a GEMM epilogue cannot add before the all-reduce."""
        return Residual(x, self(inputs), gate)

    def _sum(self, x: Tensor) -> Tensor:
        """All-reduced GEMM of this rank's inputs and weights."""
        return all_reduce(multiply(x, self.scaled_weight, None), self.axis)


class ParallelRMSNorm(Sharded, RMSNorm):
    """RMSNorm over a sharded dimension: the mean square is over the channels of all ranks."""

    def __init__(self, size: int, axis: Axis, eps: float) -> None:
        shard = Shard(0, axis.size, axis.index, (size,))
        super().__init__(shard.size, eps)
        self.shards = {"weight": shard}
        self.axis = axis
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, this rank's channels) to the same shape. Computed in float32; the result is in x's dtype."""
        inverse = torch.rsqrt(self.square_sums(x, 1) / self.size + self.eps)
        return (x.float() * inverse * self.weight.float()).to(x.dtype)

    def square_sums(self, x: Tensor, parts: int) -> Tensor:
        """Sums of squares over all ranks, float32 (B, S, parts), of each part of x (B, S, parts * channels)."""
        squares = x.float().square().view(*x.shape[:-1], parts, x.shape[-1] // parts)
        return all_reduce(squares.sum(-1), self.axis)


class ShardedHeads(SelectHeads):
    """Selects this rank's chunk of a dimension of all heads."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """(..., heads, K / 2) to (..., this rank's heads, K / 2), for head size K."""
        return x.chunk(self.axis.size, dim=-2)[self.axis.index]
