"""Token segments: adjacent ranges of tokens in one tensor, each with its own modulation vectors.

Shapes: B batch, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSegments:
    """Lengths of the consecutive segments of x (B, S, D), such as text, image and reference images."""

    lengths: tuple[int, ...]

    def slices(self) -> Iterator[slice]:
        """Token range of each segment."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def vectors(self, *vectors: Tensor) -> SegmentVectors:
        """Assign one vector (B, D) to each segment."""
        assert len(vectors) == len(self.lengths), "one vector for each segment"
        return SegmentVectors(vectors, self)


class SegmentVectors(NamedTuple):
    """One vector (B, D) for each segment; without segments, a single vector for all tokens."""

    vectors: tuple[Tensor, ...]
    segments: TokenSegments | None = None

    @classmethod
    def same(cls, vector: Tensor) -> SegmentVectors:
        """One vector for all tokens."""
        return cls((vector,))

    @property
    def last(self) -> Tensor:
        """The vector of the last segment."""
        return self.vectors[-1]

    def used(self) -> list[tuple[slice, Tensor]]:
        """Token range and vector of each non-empty segment. Adjacent segments with the same vector are merged."""
        if self.segments is None:
            return [(slice(None), self.last)]
        found: list[tuple[slice, Tensor]] = []
        for rows, vector in zip(self.segments.slices(), self.vectors, strict=True):
            if rows.start == rows.stop:
                continue
            if found and found[-1][1] is vector:
                found[-1] = (slice(found[-1][0].start, rows.stop), vector)
            else:
                found.append((rows, vector))
        return found or [(slice(None), self.last)]

    def by_token(self) -> Tensor:
        """Expand to one vector for each token: (B, 1, D) for a single vector, otherwise (B, S, D)."""
        used = self.used()
        if len(used) == 1:
            return used[0][1][:, None]
        return torch.cat([vector[:, None].expand(-1, rows.stop - rows.start, -1) for rows, vector in used], dim=1)


def vectors_of_rows(
    segments: TokenSegments | None,
    first_BMD: Tensor | None,  # noqa: N803
    rest_BMD: Tensor,  # noqa: N803
) -> list[SegmentVectors]:
    """Return M SegmentVectors from the M rows of each of two segments.

    The first segment has the rows `first_BMD`, the second segment has the rows `rest_BMD`. Without segments,
    `first_BMD` is None and the rows `rest_BMD` are for all tokens.
    """
    assert (segments is None) == (first_BMD is None), "rows of the first segment are passed only with segments"
    rest = rest_BMD.unbind(1)
    if segments is None or first_BMD is None:
        return [SegmentVectors.same(row) for row in rest]
    return [segments.vectors(*pair) for pair in zip(first_BMD.unbind(1), rest, strict=True)]
