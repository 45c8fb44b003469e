"""Gathers keys and values of a ring of ranks whose GPUs share a host, while these compute.

Each rank has places for what all ranks hold, in memory that its peers may write to. A rank writes its own chunk into
its own place, copies it from there into every other rank's, and raises a flag there; who wants to read waits for the
flags. One call of attention over all keys then needs no merging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.kernels.attention import attention
from models.kernels.copy_streams import CopyStreams
from models.layers.attention import KeyValues
from models.parallel.mesh import Axis
from models.parallel.peer_memory import PeerMemory, share_memory

BUFFERS = 2
"""Used in turn by one layer of attention after the other: see PeerGather."""

MAX_GROUPS = 2
"""Of heads, that travel behind each other."""

MIN_GROUPED_WORK = 350_000
"""Products of heads and tokens from which on groups are worth it: each must still fill a GPU evenly.

On two H100s groups made a Wan step (12 x 32,760) faster, and a Flux step (24 x 4,608) slower.
"""

ALIGNMENT = 512
"""Bytes."""

_FLAG_BYTES = 4


class PeerGather:
    """Places for keys and values of all ranks of an axis, on each of them.

    A place is written again two layers later. By then every rank has read it: a peer writes for a layer only when it
    has what this rank sent for the layer before, and this rank sent that after it had attended in the layer before
    that one. The last layers of a forward and the first of the next are kept apart by the join of what the forward
    computed. All ranks call its methods in the same order.
    """

    def __init__(
        self,
        axis: Axis,
        device: torch.device,
        streams: CopyStreams,
        allocate: Callable[[Axis, torch.device, int], PeerMemory] = share_memory,
    ) -> None:
        self._axis = axis
        self._device = device
        self._streams = streams
        self._allocate = allocate
        self._places: list[_PeerBuffers] = []
        self._layers = 0

    def key_values(self, shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int]) -> Gathered:
        """A way for keys and values (B, L, 2, H, K) of this rank, where the ranks hold `sizes` tokens."""
        batch, tokens, *rest = shape
        assert tokens == sizes[self._axis.index], "a chunk of another size than was told"
        form = _Layout((batch, sum(sizes), *rest), dtype, sum(sizes[: self._axis.index]), tokens)
        places = self._places_for(form.bytes)
        self._layers += 1
        return Gathered(places, self._layers % BUFFERS, form)

    def _places_for(self, needed: int) -> _PeerBuffers:
        """The latest places, or larger ones: graphs may still use the smaller ones, which are kept."""
        if not self._places or self._places[-1].size < needed:
            size = -(-needed // ALIGNMENT) * ALIGNMENT
            memory = self._allocate(self._axis, self._device, BUFFERS * size + _PeerBuffers.flag_bytes(self._axis))
            self._places.append(_PeerBuffers(self._axis, memory, size, self._streams))
        return self._places[-1]


@dataclass(frozen=True)
class _Layout:
    """Keys and values of all ranks as one tensor (B, tokens, 2, H, K), and which tokens are this rank's.

    They travel in groups of heads: who attends to the first ones need not wait for the others.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    tokens: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        return math.prod(self.shape[2:]) * self.dtype.itemsize

    @property
    def groups(self) -> int:
        batch, tokens, _, heads, _ = self.shape
        return MAX_GROUPS if heads % MAX_GROUPS == 0 and batch * tokens * heads >= MIN_GROUPED_WORK else 1

    def parts(self, group: int) -> tuple[tuple[int, int], ...]:
        """Where the keys and the values of a group lie in a token, and their width, in bytes."""
        if self.groups == 1:
            return ((0, self.token_bytes),)
        width = self.token_bytes // 2 // self.groups
        return (group * width, width), ((self.groups + group) * width, width)


class Gathered(KeyValues):
    """Keys and values of one layer on their way into the places of all ranks.

    They are sent once they are written to `buffer`, keys and values of each token concatenated: (B, L, 2, H, K).
    """

    def __init__(self, places: _PeerBuffers, place: int, form: _Layout) -> None:
        self._places = places
        self._place = place
        self._form = form
        self._whole = places.view(place, form)
        self.buffer = self._whole.narrow(1, form.first, form.tokens)
        super().__init__(*self.buffer.unbind(2))

    def send(self) -> None:
        """Begin to send them. What is computed next overlaps with it."""
        self._places.send(self._place, self._form)

    def attend(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Queries (B, L, H, K) to the keys of all ranks, one group of heads after the other."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        whole = (q, *self._whole.unbind(2), out)
        groups = zip(*(each.chunk(self._form.groups, dim=2) for each in whole), strict=True)
        for group, (queries, keys, values, result) in enumerate(groups):
            self._places.receive(self._place, group)
            if q.shape[1]:
                attention(queries, keys, values, out=result)
        self._places.finish()
        return out


class _PeerBuffers:
    """The places of one size, of all ranks, and their flags: a place has one for each group and each writer."""

    def __init__(self, axis: Axis, memory: PeerMemory, size: int, streams: CopyStreams) -> None:
        self.size = size
        self._axis = axis
        self._memory = memory
        self._streams = streams

    @staticmethod
    def flag_bytes(axis: Axis) -> int:
        """What flags take behind the places."""
        return _FLAG_BYTES * BUFFERS * MAX_GROUPS * axis.size

    def view(self, place: int, form: _Layout) -> Tensor:
        """What this rank has in a place."""
        start = place * self.size
        return self._memory.own[start : start + form.bytes].view(form.dtype).view(form.shape)

    def send(self, place: int, form: _Layout) -> None:
        """Copy this rank's tokens to the same place of every other rank, and tell them, group by group."""
        streams = self._streams
        streams.await_stream(streams.side, streams.current)
        for group in range(form.groups):
            for offset in range(1, self._axis.size):
                # The next rank first, so that no two ranks begin with the same one.
                rank = (self._axis.index + offset) % self._axis.size
                if form.tokens:
                    self._copy(rank, place, group, form)
                streams.write_flag(streams.side, self._flag(rank, place, group, self._axis.index), 1)

    def receive(self, place: int, group: int) -> None:
        """Let the current stream wait until all have written a group to a place of this rank; then lower their flags.

        What comes next in the current stream need not wait for these to be lowered.
        """
        streams = self._streams
        writers = [rank for rank in range(self._axis.size) if rank != self._axis.index]
        flags = [self._flag(self._axis.index, place, group, writer) for writer in writers]
        for flag in flags:
            streams.await_flag(streams.current, flag)
        streams.await_stream(streams.side, streams.current)
        for flag in flags:
            streams.write_flag(streams.side, flag, 0)

    def finish(self) -> None:
        """Let the current stream wait until all that was sent has been read here, and all flags are lowered."""
        self._streams.await_stream(self._streams.current, self._streams.side)

    def _copy(self, rank: int, place: int, group: int, form: _Layout) -> None:
        to, source = (self._memory.addresses[each] for each in (rank, self._axis.index))
        for row in range(form.shape[0]):
            token = place * self.size + (row * form.shape[1] + form.first) * form.token_bytes
            for start, width in form.parts(group):
                at = token + start
                self._streams.copy_rows(self._streams.side, to + at, source + at, form.token_bytes, width, form.tokens)

    def _flag(self, rank: int, place: int, group: int, writer: int) -> int:
        """The address of a flag that a rank has for what another one writes."""
        index = (place * MAX_GROUPS + group) * self._axis.size + writer
        return self._memory.addresses[rank] + BUFFERS * self.size + _FLAG_BYTES * index
