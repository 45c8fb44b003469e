"""Makes a single-device model the part of it that one rank of a worker group computes, after a plan beside the model.

The model's code does not change: some of its layers are replaced by parallel ones of the same names, and its tensors
are cut into shards, and joined again, where one of its methods is entered and left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from models.layers.attention import Attention
from models.layers.head_rotary import OwnHeads
from models.layers.linear import Linear
from models.layers.module_paths import matching
from models.layers.norms import RMSNorm
from models.parallel.mesh import Axis, WorkerMesh, get_sp_world_size
from models.parallel.peer_gather import PeerGather
from models.parallel.peer_memory import CopyStreams
from models.parallel.plan import ParallelPlan
from models.parallel.sequence_parallel import shard_methods
from models.parallel.sharded_keys import ShardedKeysAttention
from models.parallel.shards import SequenceShards
from models.parallel.tensor_parallel import ColumnParallelLinear, ParallelRMSNorm, RowParallelLinear, ShardedHeads
from models.parallel.usp_attention import USPAttention

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: nn.Module, plan: ParallelPlan, mesh: WorkerMesh | None, *, heads: int, feed_forward: int | None = None
) -> None:
    """Make the model, built on the meta device, this rank's part of it; loading its weights then reads only that part.

    Raises InvalidInput for degrees that do not divide the attention heads or the feed-forward layers. None is one rank.
    """
    if mesh is None:
        return
    mesh.degrees.check_model(heads, feed_forward)
    if mesh.size("tp") > 1:
        _cut_weights(model, plan, mesh.axis("tp"))
    if get_sp_world_size(mesh) > 1:
        _cut_sequence(model, plan, mesh)


def _cut_weights(model: nn.Module, plan: ParallelPlan, axis: Axis) -> None:
    def column(path: str, layer: Linear, *, gather: bool = False) -> nn.Module:
        segments = plan.segments_of(path, layer.out_features)
        return ColumnParallelLinear(layer.in_features, segments, axis, gather=gather)

    def gathered(path: str, layer: Linear) -> nn.Module:
        return column(path, layer, gather=True)

    def row(path: str, layer: Linear) -> nn.Module:
        segments = plan.segments_of(path, layer.in_features)
        return RowParallelLinear(segments, layer.out_features, axis)

    def norm(_: str, layer: RMSNorm) -> nn.Module:
        return ParallelRMSNorm(layer.weight.shape[0], axis, layer.eps)

    with torch.device("meta"):
        _replace(model, plan.column, Linear, column)
        _replace(model, plan.gathered, Linear, gathered)
        _replace(model, plan.row, Linear, row)
        _replace(model, plan.norms, RMSNorm, norm)
    _replace(model, plan.heads, OwnHeads, lambda *_: ShardedHeads(axis))


def _replace(model: nn.Module, patterns: tuple[str, ...], kind: type[M], make: Callable[[str, M], nn.Module]) -> None:
    for pattern in patterns:
        for path, module in matching(model, pattern, kind):
            replacement = make(path, module)
            if isinstance(module, Linear) and isinstance(replacement, Linear):
                replacement.has_bias = module.has_bias
            model.set_submodule(path, replacement)


def _cut_sequence(model: nn.Module, plan: ParallelPlan, mesh: WorkerMesh) -> None:
    shards = SequenceShards(get_sp_world_size(mesh), mesh.sp_index)
    gather = None
    if mesh.size("ring") > 1 and mesh.shares_memory:
        gather = PeerGather(mesh.axis("ring"), mesh.device, CopyStreams(mesh.device))
    _replace(model, plan.attention, Attention, lambda *_: USPAttention(mesh, shards, gather))
    _replace(model, plan.sharded_keys, Attention, lambda *_: ShardedKeysAttention(mesh, shards))
    shard_methods(model, plan, mesh, shards)
