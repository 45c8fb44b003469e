"""Cuts the tensors of a model's methods along the sequence, and joins them again.

A request is prepared once and predicted many times, and other requests, or the other branch of guidance, may be
prepared in between. So the whole length of a stream that prepare() cut goes along with what it prepared, among its
constants: as the shape of a tensor without elements, which no host has to read from a device, and which tells graphs of
other lengths apart even on ranks whose chunks are equal.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.parallel.collectives import gather_chunks
from models.parallel.mesh import WorkerMesh
from models.parallel.plan import Cut, Join, ParallelPlan
from models.parallel.shards import SequenceShards

if TYPE_CHECKING:
    from models.dits.base import Prepared

_LENGTH = "{}_length"
"""The constant that holds a stream's whole length, as its shape (length, 0)."""


def shard_methods(model: nn.Module, plan: ParallelPlan, mesh: WorkerMesh, shards: SequenceShards) -> None:
    """Put the cutting and joining forms in place of the methods that the plan names, and of prepare() and predict()."""
    prepared = sorted({cut.stream for cut in plan.cuts if cut.method == "prepare"})

    def sharded(name: str) -> _Sharded:
        cuts = tuple(cut for cut in plan.cuts if cut.method == name)
        joined = tuple(_Joined(join, shards, mesh) for join in plan.joins if join.method == name)
        return _Sharded(getattr(model, name), cuts, joined, shards)

    methods = {cut.method for cut in plan.cuts} | {join.method for join in plan.joins} | {"prepare", "predict"}
    replaced: dict[str, Callable[..., Any]] = {name: sharded(name) for name in methods}
    replaced["prepare"] = _Preparing(replaced["prepare"], prepared, shards)
    replaced["predict"] = _Predicting(replaced["predict"], prepared, shards)
    for name, method in replaced.items():
        setattr(model, name, method)


class _Sharded:
    """A method that gets this rank's chunks of some arguments, and whose result may be joined."""

    def __init__(
        self, method: Callable[..., Any], cuts: tuple[Cut, ...], joined: tuple[_Joined, ...], shards: SequenceShards
    ) -> None:
        self._method = method
        self._signature = inspect.signature(method)
        self._cuts = cuts
        self._joined = joined
        self._shards = shards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs)
        for cut in self._cuts:
            whole = given.arguments.get(cut.argument)
            if whole is None:
                self._shards.set_length(cut.stream, 0)
            else:
                given.arguments[cut.argument] = self._shards.local(whole, cut.dim, cut.stream)
        result = self._method(*given.args, **given.kwargs)
        for joined in self._joined:
            result = joined(result)
        return result


class _Preparing:
    """prepare(), which also tells the lengths of the streams that it cut."""

    def __init__(self, method: Callable[..., Prepared], streams: list[str], shards: SequenceShards) -> None:
        self._method = method
        self._streams = streams
        self._shards = shards

    def __call__(self, *args: Any, **kwargs: Any) -> Prepared:
        prepared = self._method(*args, **kwargs)
        device = next(iter(prepared.steps.values())).device
        lengths = {
            _LENGTH.format(stream): torch.empty(self._shards.length(stream), 0, device=device)
            for stream in self._streams
        }
        return replace(prepared, constants={**prepared.constants, **lengths})


class _Predicting:
    """predict(), for streams of the lengths that were prepared."""

    def __init__(self, method: Callable[..., Any], streams: list[str], shards: SequenceShards) -> None:
        self._method = method
        self._streams = streams
        self._shards = shards

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for stream in self._streams:
            self._shards.set_length(stream, len(kwargs.pop(_LENGTH.format(stream))))
        return self._method(*args, **kwargs)


class _Joined:
    """A chunk of a stream, joined: first those of a ulysses group, then the groups'."""

    def __init__(self, join: Join, shards: SequenceShards, mesh: WorkerMesh) -> None:
        self._join = join
        self._shards = shards
        self._ulysses, self._ring = mesh.axis("ulysses"), mesh.axis("ring")

    def __call__(self, returned: Any) -> Any:
        """What the method returned, with the whole stream in place of the chunk."""
        if not self._shards.length(self._join.stream):
            return returned
        name = self._join.result
        return self._whole(returned) if name is None else {**returned, name: self._whole(returned[name])}

    def _whole(self, chunk: Tensor) -> Tensor:
        sizes, ranks = self._shards.of(self._join.stream), self._ulysses.size
        groups = [sizes[first : first + ranks] for first in range(0, len(sizes), ranks)]
        if ranks > 1:
            chunk = gather_chunks(chunk, self._join.dim, groups[self._ring.index], self._ulysses)
        if self._ring.size > 1:
            chunk = gather_chunks(chunk, self._join.dim, [sum(group) for group in groups], self._ring)
        return chunk
