"""Norms of queries and keys as operands of kernels: sizes and weights, without modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class NormParameters(NamedTuple):
    """An RMS norm over `size` channels with a weight (this rank's channels,), or a layer norm without a weight."""

    size: int
    eps: float
    weight: Tensor | None


@dataclass(frozen=True)
class QKNormParameters:
    """The norm of each part of a tensor (B, S, parts * D): of queries and keys, or of queries alone.

    `first` are those of the first segment's tokens, `rest` of all others. A norm of the head size works on each head by
    itself, any other on all heads together. Norms are all RMS norms, or all layer norms of the head size.
    """

    first: tuple[NormParameters, ...]
    rest: tuple[NormParameters, ...]
    head_size: int

    @property
    def per_head(self) -> bool:
        """Whether each head is normalised by itself."""
        return self.rest[0].size == self.head_size

    @property
    def weights(self) -> list[Tensor]:
        """Weights of the norms of each part, those of the first segment first; none for norms without weights."""
        pairs = zip(self.first, self.rest, strict=True)
        return [norm.weight for pair in pairs for norm in pair if norm.weight is not None]
