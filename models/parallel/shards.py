"""Which part of a parameter each rank of the tp axis holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """One rank's share of a parameter: an equal share of each of its parts along one dimension, concatenated.

    Parts mean different things, so that each is sharded by itself: where a layer reads attention and feed-forward side
    by side, each rank needs its heads of the one and its channels of the other. `parts` are their sizes in the whole
    tensor. Raises ValueError for a part that does not divide.
    """

    dim: int
    ranks: int
    index: int
    parts: tuple[int, ...]

    def __post_init__(self) -> None:
        if odd := [size for size in self.parts if size % self.ranks]:
            raise ValueError(f"parts of {odd} cannot be cut into {self.ranks} equal parts")

    @property
    def size(self) -> int:
        """This rank's size along the dimension."""
        return sum(self.parts) // self.ranks

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor that a share of this shape is cut from."""
        return (*shape[: self.dim], sum(self.parts), *shape[self.dim + 1 :])

    def slices(self) -> Iterator[tuple[slice, ...]]:
        """Where the share lies in the whole tensor: an index for each part, in order."""
        start = 0
        for size in self.parts:
            share = size // self.ranks
            first = start + self.index * share
            yield (*(slice(None),) * self.dim, slice(first, first + share))
            start += size

    def select(self, whole: Tensor) -> Tensor:
        """The share, from the whole tensor."""
        return torch.cat([whole[index] for index in self.slices()], dim=self.dim)


class Sharded(nn.Module):
    """A module whose parameters are shares of the checkpoint's. `shards` says which, by the parameter's own name."""

    shards: Mapping[str, Shard]


def parameter_shards(module: nn.Module) -> dict[str, Shard]:
    """The shards of all parameters below a module, by their full name; whole parameters are not in it."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, child in module.named_modules()
        if isinstance(child, Sharded)
        for name, shard in child.shards.items()
    }
