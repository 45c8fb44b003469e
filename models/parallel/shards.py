"""Which part of a whole each rank holds: of a parameter along the tp axis, of the tokens along the sp axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """One rank's part of a parameter: an equal share of each segment along one dimension, behind each other.

    A segment is what must be cut by itself, since its parts mean different things: where a layer reads attention and
    feed-forward side by side, each rank needs its heads of the one and its channels of the other. `segments` are
    their sizes in the whole tensor. Raises ValueError for a segment that does not divide.
    """

    dim: int
    ranks: int
    index: int
    segments: tuple[int, ...]

    def __post_init__(self) -> None:
        if odd := [size for size in self.segments if size % self.ranks]:
            raise ValueError(f"segments of {odd} cannot be cut into {self.ranks} equal parts")

    @property
    def size(self) -> int:
        """This rank's size along the dimension."""
        return sum(self.segments) // self.ranks

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that a part of this shape is cut from."""
        return (*shape[: self.dim], sum(self.segments), *shape[self.dim + 1 :])

    def slices(self) -> Iterator[tuple[slice, ...]]:
        """Where the part lies in the whole tensor: an index for each segment, in order."""
        start = 0
        for size in self.segments:
            share = size // self.ranks
            first = start + self.index * share
            yield (*(slice(None),) * self.dim, slice(first, first + share))
            start += size

    def cut(self, whole: Tensor) -> Tensor:
        """The part, from the whole tensor."""
        return torch.cat([whole[index] for index in self.slices()], dim=self.dim)


class Sharded(nn.Module):
    """A module whose parameters are parts of the checkpoint's. `shards` says which, by the parameter's own name."""

    shards: Mapping[str, Shard]


def parameter_shards(module: nn.Module) -> dict[str, Shard]:
    """The shards of all parameters below a module, by their full name; whole parameters are not in it."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, child in module.named_modules()
        if isinstance(child, Sharded)
        for name, shard in child.shards.items()
    }


def chunk_sizes(length: int, parts: int) -> tuple[int, ...]:
    """The sizes of `parts` chunks in order, as even as can be: what torch.tensor_split makes. Some may be 0."""
    whole, more = divmod(length, parts)
    return tuple(whole + (part < more) for part in range(parts))


class SequenceShards:
    """How many tokens of each stream there are, and so how many each rank of the sp axis holds.

    Each stream is cut by itself. Every rank knows the sizes of all from the whole lengths, so that they are never
    exchanged, and nothing is padded. Lengths change from request to request, and between the branches of guidance:
    whoever cuts a forward's tensors tells them.
    """

    def __init__(self, ranks: int, index: int) -> None:
        self.ranks = ranks
        self.index = index
        self._lengths: dict[str, int] = {}

    def set_length(self, stream: str, length: int) -> None:
        """How many tokens a stream has from now on."""
        self._lengths[stream] = length

    def length(self, stream: str) -> int:
        """All tokens of a stream."""
        return self._lengths[stream]

    def local(self, whole: Tensor, dim: int, stream: str) -> Tensor:
        """This rank's chunk of a stream's tensor, whose length is from now on the stream's."""
        self.set_length(stream, whole.shape[dim])
        sizes = self.of(stream)
        return whole.narrow(dim, sum(sizes[: self.index]), sizes[self.index])

    def of(self, stream: str) -> tuple[int, ...]:
        """The tokens of one stream that each rank holds."""
        return chunk_sizes(self._lengths[stream], self.ranks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The tokens of all streams together that each rank holds."""
        return tuple(map(sum, zip(*map(self.of, self._lengths), strict=True)))
