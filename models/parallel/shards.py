"""Shards of parameters on the ranks of the tp axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """One rank's shard of a parameter along dimension `dim`: an equal chunk of each part, concatenated.

    `parts` are the sizes of the parts in the whole tensor. Parts have different meanings and are sharded separately:
    where the inputs of a layer are attention heads followed by feed-forward channels, each rank needs a chunk of both.
    Raises ValueError for a part that `ranks` does not divide.
    """

    dim: int
    ranks: int
    index: int
    parts: tuple[int, ...]

    def __post_init__(self) -> None:
        if odd := [size for size in self.parts if size % self.ranks]:
            raise ValueError(f"parts: {odd} are not multiples of {self.ranks}, the number of ranks; use a smaller tp")

    @property
    def size(self) -> int:
        """Size of the shard along `dim`."""
        return sum(self.parts) // self.ranks

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole tensor, from the shape of the shard."""
        return (*shape[: self.dim], sum(self.parts), *shape[self.dim + 1 :])

    def slices(self) -> Iterator[tuple[slice, ...]]:
        """Indices of the shard's chunks in the whole tensor: one for each part, in order."""
        start = 0
        for size in self.parts:
            chunk = size // self.ranks
            first = start + self.index * chunk
            yield (*(slice(None),) * self.dim, slice(first, first + chunk))
            start += size

    def select(self, whole: Tensor) -> Tensor:
        """The shard of the whole tensor."""
        return torch.cat([whole[index] for index in self.slices()], dim=self.dim)


class Sharded(nn.Module):
    """A module with sharded parameters. `shards` locates them in the checkpoint's tensors, by parameter name."""

    shards: Mapping[str, Shard]


def parameter_shards(module: nn.Module) -> dict[str, Shard]:
    """Shards of all sharded parameters of a module and its children, by full parameter name."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, child in module.named_modules()
        if isinstance(child, Sharded)
        for name, shard in child.shards.items()
    }
