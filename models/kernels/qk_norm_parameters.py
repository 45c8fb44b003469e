"""Norms of queries and keys as arguments of kernels: sizes and weights, without modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class NormParameters(NamedTuple):
    """Norm over `size` channels: an RMS norm with a weight, or a layer norm without a weight.

    A sharded norm has the weight of this rank's channels only.
    """

    size: int
    eps: float
    weight: Tensor | None


@dataclass(frozen=True)
class QKNormParameters:
    """Norms of the parts of a tensor (B, S, parts * D): of queries and keys, or of queries only.

    `first` are the norms of the first segment's tokens, `rest` are the norms of all other tokens. A norm of size
    `head_size` is over each head, a norm of another size over all heads together. All norms are RMS norms, or all are
    layer norms of size `head_size`.
    """

    first: tuple[NormParameters, ...]
    rest: tuple[NormParameters, ...]
    head_size: int

    @property
    def per_head(self) -> bool:
        """Whether the norms are over each head."""
        return self.rest[0].size == self.head_size

    @property
    def weights(self) -> list[Tensor]:
        """Two weights for each part: of the norm in `first`, then of the norm in `rest`; empty for layer norms."""
        pairs = zip(self.first, self.rest, strict=True)
        return [norm.weight for pair in pairs for norm in pair if norm.weight is not None]
