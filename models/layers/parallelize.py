"""Makes a single-device model the part of it that one rank of a worker group computes, after a plan beside the model.

The model's code does not change: some of its layers are replaced by parallel ones of the same names, and its tensors
are cut into shards, and joined again, where a module is entered and left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.layers.attention import Attention
from models.layers.collectives import gather_chunks
from models.layers.mesh import Axis, WorkerMesh, get_sp_world_size
from models.layers.norms import RMSNorm
from models.layers.parallel_plan import Cut, Join, ParallelPlan, matches
from models.layers.shards import SequenceShards
from models.layers.tensor_parallel import ColumnParallelLinear, ParallelRMSNorm, RowParallelLinear
from models.layers.usp_attention import USPAttention

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


def matching(model: nn.Module, pattern: str, kind: type[M]) -> Iterator[tuple[str, M]]:
    """The modules whose path matches. Raises TypeError for one of another kind."""
    for path, module in list(model.named_modules()):
        if matches(path, pattern):
            if not isinstance(module, kind):
                raise TypeError(f"{path} is {type(module).__name__}, but the plan has it for {kind.__name__}")
            yield path, module


def _cut_weights(model: nn.Module, plan: ParallelPlan, axis: Axis) -> None:
    def column(path: str, layer: nn.Linear, *, gather: bool = False) -> nn.Module:
        segments = plan.segments_of(path, layer.out_features)
        return ColumnParallelLinear(layer.in_features, segments, axis, bias=layer.bias is not None, gather=gather)

    def gathered(path: str, layer: nn.Linear) -> nn.Module:
        return column(path, layer, gather=True)

    def row(path: str, layer: nn.Linear) -> nn.Module:
        segments = plan.segments_of(path, layer.in_features)
        return RowParallelLinear(segments, layer.out_features, axis, bias=layer.bias is not None)

    def norm(_: str, layer: RMSNorm) -> nn.Module:
        return ParallelRMSNorm(layer.weight.shape[0], axis, layer.eps)

    with torch.device("meta"):
        _replace(model, plan.column, nn.Linear, column)
        _replace(model, plan.gathered, nn.Linear, gathered)
        _replace(model, plan.row, nn.Linear, row)
        _replace(model, plan.norms, RMSNorm, norm)


def _replace(model: nn.Module, patterns: tuple[str, ...], kind: type[M], make: Callable[[str, M], nn.Module]) -> None:
    for pattern in patterns:
        for path, module in matching(model, pattern, kind):
            model.set_submodule(path, make(path, module))


def _cut_sequence(model: nn.Module, plan: ParallelPlan, mesh: WorkerMesh) -> None:
    shards = SequenceShards(get_sp_world_size(mesh), mesh.sp_index)
    _replace(model, plan.attention, Attention, lambda *_: USPAttention(mesh, shards))
    for cut in plan.cuts:
        for _, module in matching(model, cut.module, nn.Module):
            module.register_forward_pre_hook(_Cutting(module, cut, shards), with_kwargs=True)
    for join in plan.joins:
        for _, module in matching(model, join.module, nn.Module):
            module.register_forward_hook(_Joining(join, shards, mesh))


class _Cutting:
    """The hook before a module's forward that puts this rank's chunk in place of an argument, however it is passed."""

    def __init__(self, module: nn.Module, cut: Cut, shards: SequenceShards) -> None:
        self._place = list(inspect.signature(module.forward).parameters).index(cut.argument)
        self._cut = cut
        self._shards = shards

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self._place < len(args):
            before, value, after = args[: self._place], args[self._place], args[self._place + 1 :]
            return (*before, self._local(value), *after), kwargs
        return args, kwargs | {self._cut.argument: self._local(kwargs[self._cut.argument])}

    def _local(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._shards.local(value, self._cut.dim, self._cut.stream)
        return type(value)(*map(self._local, value))


class _Joining:
    """The hook after a module's forward that joins the chunks: first those of a ulysses group, then the groups'."""

    def __init__(self, join: Join, shards: SequenceShards, mesh: WorkerMesh) -> None:
        self._join = join
        self._shards = shards
        self._ulysses, self._ring = mesh.axis("ulysses"), mesh.axis("ring")

    def __call__(self, _: nn.Module, __: object, result: Tensor) -> Tensor:
        sizes, ranks = self._shards.of(self._join.stream), self._ulysses.size
        groups = [sizes[first : first + ranks] for first in range(0, len(sizes), ranks)]
        if ranks > 1:
            result = gather_chunks(result, self._join.dim, groups[self._ring.index], self._ulysses)
        if self._ring.size > 1:
            result = gather_chunks(result, self._join.dim, [sum(group) for group in groups], self._ring)
        return result
