"""Lengths of the token segments of the forward in progress, and so how many tokens each rank of the sp axis holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


def chunk_sizes(length: int, parts: int) -> tuple[int, ...]:
    """The sizes of `parts` chunks in order, as even as can be: what torch.tensor_split makes. Some may be 0."""
    # Not by divmod(), which a compiler does not trace for a length that it takes as variable.
    whole, more = length // parts, length % parts
    return tuple(whole + (part < more) for part in range(parts))


@dataclass(frozen=True)
class SegmentLengths:
    """Whole lengths of token segments, each of which is sharded by itself between `ranks`; `index` is this rank's.

    Every rank knows the sizes of all chunks from the whole lengths, so that they are never exchanged, and nothing is
    padded.
    """

    ranks: int
    index: int
    lengths: Mapping[str, int]

    def of(self, segment: str) -> tuple[int, ...]:
        """The tokens of one segment that each rank holds."""
        return chunk_sizes(self.lengths[segment], self.ranks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The tokens of all segments together that each rank holds."""
        return tuple(map(sum, zip(*map(self.of, self.lengths), strict=True)))

    def local(self, whole: Tensor, dim: int, segment: str) -> Tensor:
        """This rank's chunk, along `dim`, of a tensor that holds a whole segment."""
        sizes = self.of(segment)
        return whole.narrow(dim, sum(sizes[: self.index]), sizes[self.index])

    def extended(self, lengths: Mapping[str, int]) -> SegmentLengths:
        """These and further ones. Raises ValueError for a segment that has another length already."""
        for segment, length in lengths.items():
            if self.lengths.get(segment, length) != length:
                raise ValueError(f"{segment}: {length} tokens is not the segment's length, {self.lengths[segment]}")
        return SegmentLengths(self.ranks, self.index, {**self.lengths, **lengths})


class SegmentScope:
    """The segment lengths of a model's forward in progress, for `ranks` of which this one has an index.

    Lengths change from request to request, and between the branches of guidance: each call of an entry point enters its
    own, for its duration, on top of those that the calls around it entered.
    """

    def __init__(self, ranks: int, index: int) -> None:
        self._outside = SegmentLengths(ranks, index, {})
        self._current: SegmentLengths | None = None

    @property
    def current(self) -> SegmentLengths:
        """The lengths of the call in progress. Raises RuntimeError outside a call of an entry point."""
        if self._current is None:
            raise RuntimeError("segment lengths are read outside a call of an entry point, where there are none")
        return self._current

    @contextmanager
    def entered(self, lengths: Mapping[str, int]) -> Iterator[SegmentLengths]:
        """Add lengths until the end of the context. Raises ValueError for a segment that has another length already."""
        before = self._current
        self._current = (before or self._outside).extended(lengths)
        try:
            yield self._current
        finally:
            self._current = before
