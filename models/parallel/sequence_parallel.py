"""Shards arguments of a model's entry points along the sequence, and gathers their results.

A request is prepared once and predicted many times, and other requests, or the other branch of guidance, may be
prepared in between. So the whole lengths of the segments that prepare() sharded go along with what it prepared, as
static keywords of predict(): they tell graphs of other lengths apart even on ranks whose chunks are equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.dits.base import DiffusionTransformer, Prepared, length_keyword
from models.parallel.collectives import gather_chunks
from models.parallel.mesh import WorkerMesh
from models.parallel.plan import Cut, Join, ParallelPlan
from models.parallel.segment_lengths import SegmentLengths, SegmentScope


def shard_entry_points(model: DiffusionTransformer, plan: ParallelPlan, mesh: WorkerMesh, scope: SegmentScope) -> None:
    """Register the sharded forms of the methods that the plan names; their calls enter lengths into the scope."""
    prepared = sorted({cut.segment for cut in plan.cuts if cut.method == "prepare"})
    methods = {cut.method for cut in plan.cuts} | {join.method for join in plan.joins}
    if prepared:
        methods.add("predict")
    for name in sorted(methods):
        signature = model.entry_point_signature(name)
        cuts = tuple(cut for cut in plan.cuts if cut.method == name)
        gathers = tuple(_Gather(join, mesh) for join in plan.joins if join.method == name)
        form = _ShardedMethod(signature, cuts, gathers, scope)
        if prepared and name == "prepare":
            model.shard_entry_point(name, _Preparing(form, prepared))
        elif prepared and name == "predict":
            model.shard_entry_point(name, _Predicting(form, prepared, scope))
        else:
            model.shard_entry_point(name, form)


def check_entry_points(model: DiffusionTransformer, plan: ParallelPlan) -> None:
    """Raise TypeError where the plan names a method that is no entry point, or an argument that the method lacks."""
    for join in plan.joins:
        model.entry_point_signature(join.method)
    for cut in plan.cuts:
        if cut.argument not in model.entry_point_signature(cut.method).parameters:
            raise TypeError(f"{type(model).__name__}.{cut.method}() has no {cut.argument}, which its plan shards")


class _ShardedMethod:
    """A method that gets this rank's chunks of some arguments, and whose result may be gathered."""

    def __init__(
        self, signature: inspect.Signature, cuts: tuple[Cut, ...], gathers: tuple[_Gather, ...], scope: SegmentScope
    ) -> None:
        self._signature = signature
        self._cuts = cuts
        self._gathers = gathers
        self._scope = scope

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.call(method, args, kwargs)[0]

    def call(
        self, method: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, SegmentLengths]:
        """What the method returns, gathered, and the lengths that it was called with."""
        given = self._signature.bind(*args, **kwargs)
        with self._scope.entered(self._lengths(given.arguments)) as lengths:
            for cut in self._cuts:
                if (whole := given.arguments.get(cut.argument)) is not None:
                    given.arguments[cut.argument] = lengths.local(whole, cut.dim, cut.segment)
            result = method(*given.args, **given.kwargs)
            for gather in self._gathers:
                result = gather(result, lengths)
        return result, lengths

    def _lengths(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Of the segments of the given arguments. Raises ValueError where arguments of one segment differ in length."""
        lengths: dict[str, int] = {}
        for cut in self._cuts:
            whole = arguments.get(cut.argument)
            length = 0 if whole is None else whole.shape[cut.dim]
            if lengths.setdefault(cut.segment, length) != length:
                message = f"{cut.method}(): {cut.argument} has {length} tokens, and other arguments of {cut.segment}"
                raise ValueError(f"{message} have {lengths[cut.segment]}")
        return lengths


class _Preparing:
    """prepare(), whose result also has the lengths of the segments that it sharded."""

    def __init__(self, form: _ShardedMethod, segments: list[str]) -> None:
        self._form = form
        self._segments = segments

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Prepared:
        prepared, lengths = self._form.call(method, args, kwargs)
        made: Prepared = replace(prepared, lengths={each: lengths.lengths[each] for each in self._segments})
        return made


class _Predicting:
    """predict(), for segments of the lengths that were prepared: keywords that the model itself does not take."""

    def __init__(self, form: _ShardedMethod, segments: list[str], scope: SegmentScope) -> None:
        self._form = form
        self._keywords = {length_keyword(segment): segment for segment in segments}
        self._scope = scope

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if missing := sorted(self._keywords.keys() - kwargs.keys()):
            raise TypeError(f"predict() lacks {', '.join(missing)}; Prepared.inputs() has the lengths of segments")
        lengths = {segment: kwargs.pop(keyword) for keyword, segment in self._keywords.items()}
        with self._scope.entered(lengths):
            return self._form(method, *args, **kwargs)


class _Gather:
    """Gathers the chunks of a segment: first those of a ulysses group, then the groups'."""

    def __init__(self, join: Join, mesh: WorkerMesh) -> None:
        self._join = join
        self._ulysses, self._ring = mesh.axis("ulysses"), mesh.axis("ring")

    def __call__(self, returned: Any, lengths: SegmentLengths) -> Any:
        """What the method returned, with the whole segment in place of the chunk."""
        if not lengths.lengths[self._join.segment]:
            return returned
        name, sizes = self._join.result, lengths.of(self._join.segment)
        return self._whole(returned, sizes) if name is None else {**returned, name: self._whole(returned[name], sizes)}

    def _whole(self, chunk: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ranks = self._ulysses.size
        groups = [sizes[first : first + ranks] for first in range(0, len(sizes), ranks)]
        if ranks > 1:
            chunk = gather_chunks(chunk, self._join.dim, groups[self._ring.index], self._ulysses)
        if self._ring.size > 1:
            chunk = gather_chunks(chunk, self._join.dim, [sum(group) for group in groups], self._ring)
        return chunk
