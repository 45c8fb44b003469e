"""Token segment lengths of the current forward pass, and numbers of tokens of the sp ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


def chunk_sizes(length: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` chunks, as in torch.tensor_split: they differ by at most 1, and may be 0."""
    # torch.compile cannot trace divmod() of a dynamic length.
    whole, more = length // parts, length % parts
    return tuple(whole + (part < more) for part in range(parts))


@dataclass(frozen=True)
class SegmentLengths:
    """Full lengths of token segments. Each segment is sharded separately; this rank is rank `index` of `ranks`.

    The sizes of all ranks' chunks follow from the full lengths: ranks never exchange sizes.
    """

    ranks: int
    index: int
    lengths: Mapping[str, int]

    def of(self, segment: str) -> tuple[int, ...]:
        """Number of tokens of one segment on each rank."""
        return chunk_sizes(self.lengths[segment], self.ranks)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of tokens of all segments on each rank."""
        return tuple(map(sum, zip(*map(self.of, self.lengths), strict=True)))

    def local(self, whole: Tensor, dim: int, segment: str) -> Tensor:
        """This rank's chunk, along `dim`, of a tensor that holds the whole segment."""
        sizes = self.of(segment)
        return whole.narrow(dim, sum(sizes[: self.index]), sizes[self.index])

    def extended(self, lengths: Mapping[str, int]) -> SegmentLengths:
        """These lengths and `lengths`. Raises ValueError for a segment that already has a different length."""
        for segment, length in lengths.items():
            if self.lengths.get(segment, length) != length:
                message = f"{segment}: {length} tokens is not the segment's length, {self.lengths[segment]}"
                raise ValueError(f"{message}; a segment has one length in a forward pass")
        return SegmentLengths(self.ranks, self.index, {**self.lengths, **lengths})


class SegmentScope:
    """Segment lengths of a model's current forward pass, on rank `index` of `ranks` ranks.

    Lengths differ between requests and between guidance branches. Each call of an entry point adds its lengths for the
    duration of the call; a nested call adds its lengths to the lengths of the outer call.
    """

    def __init__(self, ranks: int, index: int) -> None:
        self._outside = SegmentLengths(ranks, index, {})
        self._current: SegmentLengths | None = None

    @property
    def current(self) -> SegmentLengths:
        """The lengths of the current call. Raises RuntimeError outside a call of an entry point."""
        if self._current is None:
            raise RuntimeError("segment lengths are undefined outside a call of an entry point; read them inside one")
        return self._current

    @contextmanager
    def entered(self, lengths: Mapping[str, int]) -> Iterator[SegmentLengths]:
        """Add lengths until the end of the context. Raises ValueError for a segment that already has another length."""
        before = self._current
        self._current = (before or self._outside).extended(lengths)
        try:
            yield self._current
        finally:
            self._current = before
