"""Sequence parallelism of a model's entry points: shards their arguments and gathers their results.

The method prepare() runs once per request and predict() once per step; prepare() of other requests or guidance branches
may run in between. The result of prepare() therefore contains the full lengths of the segments that prepare() sharded,
and predict() receives them as static keywords. These lengths are also part of a CUDA graph's key: segments of different
lengths may give this rank chunks of the same size, but need different graphs.
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
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument
from models.parallel.segment_lengths import SegmentLengths, SegmentScope


def shard_entry_points(model: DiffusionTransformer, plan: ParallelPlan, mesh: WorkerMesh, scope: SegmentScope) -> None:
    """Register the sharded forms of the plan's entry points. Each call adds its segment lengths to `scope`."""
    prepared = sorted({each.segment for each in plan.sharded_arguments if each.method == "prepare"})
    methods = {each.method for each in plan.sharded_arguments} | {each.method for each in plan.gathered_results}
    if prepared:
        methods.add("predict")
    for name in sorted(methods):
        signature = model.entry_point_signature(name)
        sharded = tuple(each for each in plan.sharded_arguments if each.method == name)
        gathers = tuple(_Gather(each, mesh) for each in plan.gathered_results if each.method == name)
        form = _ShardedMethod(signature, sharded, gathers, scope)
        if prepared and name == "prepare":
            model.shard_entry_point(name, _ShardedPrepare(form, prepared))
        elif prepared and name == "predict":
            model.shard_entry_point(name, _ShardedPredict(form, prepared, scope))
        else:
            model.shard_entry_point(name, form)


def check_entry_points(model: DiffusionTransformer, plan: ParallelPlan) -> None:
    """Raise TypeError if the plan names a method that is not an entry point, or an unknown argument."""
    for result in plan.gathered_results:
        model.entry_point_signature(result.method)
    for sharded in plan.sharded_arguments:
        if sharded.argument not in model.entry_point_signature(sharded.method).parameters:
            method = f"{type(model).__name__}.{sharded.method}()"
            raise TypeError(f"{method} has no {sharded.argument}, which its plan shards; correct sharded_arguments")


class _ShardedMethod:
    """Sharded form of a method: passes this rank's chunks of some arguments, and gathers results."""

    def __init__(
        self,
        signature: inspect.Signature,
        sharded: tuple[ShardedArgument, ...],
        gathers: tuple[_Gather, ...],
        scope: SegmentScope,
    ) -> None:
        self._signature = signature
        self._sharded = sharded
        self._gathers = gathers
        self._scope = scope

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self.call(method, args, kwargs)[0]

    def call(
        self, method: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, SegmentLengths]:
        """The gathered result of the method, and the segment lengths of the call."""
        bound = self._signature.bind(*args, **kwargs)
        with self._scope.entered(self._lengths(bound.arguments)) as lengths:
            for each in self._sharded:
                if (whole := bound.arguments.get(each.argument)) is not None:
                    bound.arguments[each.argument] = lengths.local(whole, each.dim, each.segment)
            result = method(*bound.args, **bound.kwargs)
            for gather in self._gathers:
                result = gather(result, lengths)
        return result, lengths

    def _lengths(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Full lengths of the arguments' segments. Raises ValueError where arguments of a segment differ in length."""
        lengths: dict[str, int] = {}
        for each in self._sharded:
            whole = arguments.get(each.argument)
            length = 0 if whole is None else whole.shape[each.dim]
            if lengths.setdefault(each.segment, length) != length:
                message = f"{each.method}(): {each.argument} has {length} tokens, and other arguments of {each.segment}"
                raise ValueError(f"{message} have {lengths[each.segment]}; a segment has one length")
        return lengths


class _ShardedPrepare:
    """prepare() whose result also contains the full lengths of the segments that prepare() sharded."""

    def __init__(self, form: _ShardedMethod, segments: list[str]) -> None:
        self._form = form
        self._segments = segments

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Prepared:
        prepared, lengths = self._form.call(method, args, kwargs)
        extended: Prepared = replace(prepared, lengths={each: lengths.lengths[each] for each in self._segments})
        return extended


class _ShardedPredict:
    """predict() with a keyword for the full length of each segment that prepare() sharded.

    The model's own method does not receive these keywords.
    """

    def __init__(self, form: _ShardedMethod, segments: list[str], scope: SegmentScope) -> None:
        self._form = form
        self._keywords = {length_keyword(segment): segment for segment in segments}
        self._scope = scope

    def __call__(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if missing := sorted(self._keywords.keys() - kwargs.keys()):
            raise TypeError(f"predict() lacks {', '.join(missing)}; pass the keywords of Prepared.inputs()")
        lengths = {segment: kwargs.pop(keyword) for keyword, segment in self._keywords.items()}
        with self._scope.entered(lengths):
            return self._form(method, *args, **kwargs)


class _Gather:
    """Gathers the chunks of a segment, first within each ulysses group, then along the ring."""

    def __init__(self, gathered: GatheredResult, mesh: WorkerMesh) -> None:
        self._gathered = gathered
        self._ulysses, self._ring = mesh.axis("ulysses"), mesh.axis("ring")

    def __call__(self, returned: Any, lengths: SegmentLengths) -> Any:
        """The returned value with the whole segment in place of this rank's chunk."""
        if not lengths.lengths[self._gathered.segment]:
            return returned
        name, sizes = self._gathered.result, lengths.of(self._gathered.segment)
        return self._whole(returned, sizes) if name is None else {**returned, name: self._whole(returned[name], sizes)}

    def _whole(self, chunk: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ranks = self._ulysses.size
        groups = [sizes[first : first + ranks] for first in range(0, len(sizes), ranks)]
        if ranks > 1:
            chunk = gather_chunks(chunk, self._gathered.dim, groups[self._ring.index], self._ulysses)
        if self._ring.size > 1:
            chunk = gather_chunks(chunk, self._gathered.dim, [sum(group) for group in groups], self._ring)
        return chunk
