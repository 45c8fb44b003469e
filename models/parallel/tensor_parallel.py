"""Layers whose weights are cut between the ranks of the tp axis, after Megatron-LM (arXiv 1909.08053).

A column-parallel layer gives each rank some of its outputs, and a row-parallel layer behind it takes just these: the
pair needs one sum over the ranks. Parameters are local tensors: whatever works on a Linear's weight works on theirs.
`shards` says where they lie in the checkpoint's.
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
    """A linear layer of which this rank has an equal share of each part of the outputs.

    With `gather` the outputs of all ranks are joined, in the whole layer's order: for layers that are followed by
    something that needs all of them. Such a layer can have one part only.
    """

    def __init__(self, in_features: int, parts: Sequence[int], axis: Axis, *, gather: bool = False) -> None:
        if gather and len(parts) > 1:
            raise ValueError(f"outputs in {len(parts)} parts cannot be gathered: they would change places")
        shard = Shard(0, axis.size, axis.index, tuple(parts))
        super().__init__(in_features, shard.size)
        self.shards = {"weight": shard, "bias": shard}
        self.axis = axis
        self.gather = gather

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., this rank's outputs), or to all outputs."""
        result = super().forward(x)
        return gather_last(result, self.axis) if self.gather else result


class RowParallelLinear(Sharded, Linear):
    """A linear layer of which this rank takes an equal share of each part of the inputs.

    The bias is whole on every rank, and added once: to the sum, not to one of its terms.
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
        """Write the result (B, tokens, out_features) of this rank's inputs (B, tokens, inputs)."""
        torch.add(self._sum(x), self.bias, out=out)

    def gelu_into(self, x: Tensor, out: Tensor) -> None:
        """The same, through GELU in its tanh form."""
        write_gelu(self(x), out)

    def update(self, stream: Tensor, x: Tensor, gate: SegmentVectors) -> Residual:
        """A stream, with gate * the result that is still to be added: it must have been summed first."""
        return Residual(stream, self(x), gate)

    def _sum(self, x: Tensor) -> Tensor:
        """The products of all ranks' inputs."""
        return all_reduce(multiply(x, self.factor, None), self.axis)


class ParallelRMSNorm(Sharded, RMSNorm):
    """RMSNorm over a dimension that is cut between ranks: the mean square is that of all ranks' parts."""

    def __init__(self, size: int, axis: Axis, eps: float) -> None:
        shard = Shard(0, axis.size, axis.index, (size,))
        super().__init__(shard.size, eps)
        self.shards = {"weight": shard}
        self.axis = axis
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, this rank's channels) to the same. Computed in float32, result in x's type."""
        inverse = torch.rsqrt(self.square_sums(x, 1) / self.size + self.eps)
        return (x.float() * inverse * self.weight.float()).to(x.dtype)

    def square_sums(self, x: Tensor, parts: int) -> Tensor:
        """Sums of squares over all ranks (B, S, parts), float32, of each part of x (B, S, parts * channels)."""
        squares = x.float().square().view(*x.shape[:-1], parts, x.shape[-1] // parts)
        return all_reduce(squares.sum(-1), self.axis)


class ShardedHeads(SelectHeads):
    """A tensor with a dimension of all heads: this rank takes its heads, an equal share in order."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """(..., heads, K) to (..., this rank's heads, K)."""
        return x.chunk(self.axis.size, dim=-2)[self.axis.index]
