"""Applies a parallel plan to a single-device model: the model becomes one rank's shard of it.

The code of the model does not change. Layers are replaced by parallel layers of the same name, arguments of entry
points are sharded, and their results are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from models.dits.base import DiffusionTransformer
from models.kernels.copy_streams import CopyStreams
from models.layers.attention import Attention
from models.layers.head_rotary import SelectHeads
from models.layers.linear import Linear
from models.layers.module_paths import matching
from models.layers.norms import RMSNorm
from models.parallel.mesh import Axis, WorkerMesh, get_sp_world_size
from models.parallel.peer_gather import PeerGather
from models.parallel.plan import ParallelPlan
from models.parallel.segment_lengths import SegmentScope
from models.parallel.sequence_parallel import check_entry_points, shard_entry_points
from models.parallel.sharded_keys import ShardedKeysAttention
from models.parallel.tensor_parallel import ColumnParallelLinear, ParallelRMSNorm, RowParallelLinear, ShardedHeads
from models.parallel.usp_attention import USPAttention

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: DiffusionTransformer,
    plan: ParallelPlan,
    mesh: WorkerMesh | None,
    *,
    heads: int,
    feed_forward: int | None = None,
) -> None:
    """Shard a model on the meta device for this rank. Loading then reads only this rank's shards of the weights.

    `mesh` None: one rank. `heads` and `feed_forward` are as in Degrees.check_model(). Raises InvalidInput for degrees
    that do not divide the attention heads or the feed-forward width. Raises TypeError where the plan names a module of
    another type, a missing Attention or SelectHeads module, a method that is not an entry point, or an argument that
    the method lacks.
    """
    check_entry_points(model, plan)
    if mesh is None:
        return
    mesh.degrees.check_model(heads, feed_forward)
    if mesh.size("tp") > 1:
        _shard_weights(model, plan, mesh.axis("tp"))
    if get_sp_world_size(mesh) > 1:
        _shard_sequence(model, plan, mesh)


def _shard_weights(model: nn.Module, plan: ParallelPlan, axis: Axis) -> None:
    def column(path: str, layer: Linear, *, gather: bool = False) -> nn.Module:
        parts = plan.parts_of(path, layer.out_features)
        return ColumnParallelLinear(layer.in_features, parts, axis, gather=gather)

    def gathered(path: str, layer: Linear) -> nn.Module:
        return column(path, layer, gather=True)

    def row(path: str, layer: Linear) -> nn.Module:
        parts = plan.parts_of(path, layer.in_features)
        return RowParallelLinear(parts, layer.out_features, axis)

    def norm(_: str, layer: RMSNorm) -> nn.Module:
        return ParallelRMSNorm(layer.weight.shape[0], axis, layer.eps)

    with torch.device("meta"):
        _replace(model, plan.column, Linear, column)
        _replace(model, plan.gathered, Linear, gathered)
        _replace(model, plan.row, Linear, row)
        _replace(model, plan.norms, RMSNorm, norm)
    _replace_each(model, plan.select_heads, SelectHeads, lambda *_: ShardedHeads(axis))


def _replace(model: nn.Module, patterns: tuple[str, ...], kind: type[M], make: Callable[[str, M], nn.Module]) -> None:
    for pattern in patterns:
        for path, module in matching(model, pattern, kind):
            replacement = make(path, module)
            if isinstance(module, Linear) and isinstance(replacement, Linear):
                replacement.has_bias = module.has_bias
            model.set_submodule(path, replacement)


def _replace_each(
    model: nn.Module, patterns: tuple[str, ...], kind: type[M], make: Callable[[str, M], nn.Module]
) -> None:
    """Run _replace(). Raises TypeError for a pattern that matches no module.

    Such a pattern would silently mix replicated tokens or heads with sharded tokens or heads.
    """
    if unmatched := [pattern for pattern in patterns if not list(matching(model, pattern, kind))]:
        message = f"{type(model).__name__} has no module {', '.join(unmatched)}, which its plan shards"
        raise TypeError(f"{message}; correct the pattern")
    _replace(model, patterns, kind, make)


def _shard_sequence(model: DiffusionTransformer, plan: ParallelPlan, mesh: WorkerMesh) -> None:
    scope = SegmentScope(get_sp_world_size(mesh), mesh.sp_index)
    gather = None
    if mesh.size("ring") > 1 and mesh.shares_memory:
        gather = PeerGather(mesh.axis("ring"), mesh.device, CopyStreams(mesh.device))
    _replace_each(model, plan.attention, Attention, lambda *_: USPAttention(mesh, scope, gather))
    _replace_each(model, plan.sharded_keys, Attention, lambda *_: ShardedKeysAttention(mesh, scope))
    shard_entry_points(model, plan, mesh, scope)
