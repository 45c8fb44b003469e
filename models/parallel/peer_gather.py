"""All-gather of keys and values along the ring for GPUs of one host; overlaps with computation.

Each rank has buffers for the keys and values of all ranks, in memory that its peers can write to. A rank writes its own
chunk to its own buffer, copies it to the buffers of all other ranks, and sets a flag there. Readers wait for the flags.
One attention call per head group then reads all keys: it replaces a call per chunk and the merging of the results.

Shapes: B batch, L tokens of this rank, H heads, K head size.
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

NUM_BUFFERS = 2
"""Number of buffers. Consecutive attention layers alternate between the buffers: see PeerGather."""

MAX_GROUPS = 2
"""Largest number of head groups; groups are sent sequentially."""

MIN_GROUPED_WORK = 350_000
"""Smallest batch x heads x tokens for which head groups pay off.

Attention to a group must still occupy the whole GPU. On two H100s groups made a Wan step (12 heads x 32,760 tokens)
faster, and a Flux step (24 x 4,608) slower.
"""

ALIGNMENT = 512
"""Alignment of a buffer's size, in bytes."""

_FLAG_BYTES = 4
"""Size of a flag, in bytes."""


class PeerGather:
    """Buffers on each rank of an axis for the keys and values of all its ranks.

    A buffer is reused two layers later. A peer writes to a buffer in layer n only after it has received this rank's
    chunk of layer n - 1. This rank sent that chunk after its attention in layer n - 2, which was the last to read the
    buffer. Between two forward passes, the all-gather of the first pass's result has the same effect. All ranks must
    call the methods in the same order.
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
        self._buffers: list[_PeerBuffers] = []
        self._layers = 0

    def key_values(self, shape: Sequence[int], dtype: torch.dtype, sizes: Sequence[int]) -> Gathered:
        """Buffer for one layer's keys and values (B, L, 2, H, K). `sizes` are the ranks' numbers of tokens."""
        batch, tokens, *rest = shape
        assert tokens == sizes[self._axis.index], "this rank's chunk has another size than `sizes` states"
        layout = _Layout((batch, sum(sizes), *rest), dtype, sum(sizes[: self._axis.index]), tokens)
        buffers = self._buffers_for(layout.bytes)
        self._layers += 1
        return Gathered(buffers, self._layers % NUM_BUFFERS, layout)

    def _buffers_for(self, needed: int) -> _PeerBuffers:
        """The latest buffers if large enough, else new ones. Old buffers are retained: CUDA graphs may use them."""
        if not self._buffers or self._buffers[-1].size < needed:
            size = -(-needed // ALIGNMENT) * ALIGNMENT
            memory = self._allocate(self._axis, self._device, NUM_BUFFERS * size + _PeerBuffers.flag_bytes(self._axis))
            self._buffers.append(_PeerBuffers(self._axis, memory, size, self._streams))
        return self._buffers[-1]


@dataclass(frozen=True)
class _Layout:
    """Layout of a buffer: one tensor (B, tokens, 2, H, K) of all ranks.

    This rank's tokens are `first` to `first + tokens - 1`. Heads are sent in groups, so that attention to the first
    group does not wait for the other groups.
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
        """Offset within a token and width in bytes: of the group's keys, then of its values.

        With a single group, keys and values are one part.
        """
        if self.groups == 1:
            return ((0, self.token_bytes),)
        width = self.token_bytes // 2 // self.groups
        return (group * width, width), ((self.groups + group) * width, width)


class Gathered(KeyValues):
    """Keys and values of one layer, gathered into the buffers of all ranks.

    The caller writes this rank's keys and values to `buffer` (B, L, 2, H, K), then calls send().
    """

    def __init__(self, buffers: _PeerBuffers, index: int, layout: _Layout) -> None:
        self._buffers = buffers
        self._index = index
        self._layout = layout
        self._whole = buffers.view(index, layout)
        self.buffer = self._whole.narrow(1, layout.first, layout.tokens)
        super().__init__(*self.buffer.unbind(2))

    def send(self) -> None:
        """Start to send this rank's chunk to all other ranks. Later computation overlaps with the copies."""
        self._buffers.send(self._index, self._layout)

    def attend(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Attention of queries (B, L, H, K) to the keys of all ranks, by head group."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        whole = (q, *self._whole.unbind(2), out)
        groups = zip(*(each.chunk(self._layout.groups, dim=2) for each in whole), strict=True)
        for group, (queries, keys, values, result) in enumerate(groups):
            self._buffers.receive(self._index, group)
            if q.shape[1]:
                attention(queries, keys, values, out=result)
        self._buffers.finish()
        return out


class _PeerBuffers:
    """Buffers of one size on all ranks, and their flags. A buffer has a flag for each head group and each writer."""

    def __init__(self, axis: Axis, memory: PeerMemory, size: int, streams: CopyStreams) -> None:
        self.size = size
        self._axis = axis
        self._memory = memory
        self._streams = streams

    @staticmethod
    def flag_bytes(axis: Axis) -> int:
        """Size of all flags of a rank, in bytes. The flags follow the buffers in memory."""
        return _FLAG_BYTES * NUM_BUFFERS * MAX_GROUPS * axis.size

    def view(self, index: int, layout: _Layout) -> Tensor:
        """This rank's buffer as a tensor of the layout."""
        start = index * self.size
        return self._memory.own[start : start + layout.bytes].view(layout.dtype).view(layout.shape)

    def send(self, index: int, layout: _Layout) -> None:
        """Copy this rank's chunk to the same buffer of all other ranks and set their flags, group by group."""
        streams = self._streams
        streams.await_stream(streams.side, streams.current)
        for group in range(layout.groups):
            for offset in range(1, self._axis.size):
                # Each rank first sends to the next rank, so that no two ranks send to the same rank at once.
                rank = (self._axis.index + offset) % self._axis.size
                if layout.tokens:
                    self._copy(rank, index, group, layout)
                streams.write_flag(streams.side, self._flag(rank, index, group, self._axis.index), 1)

    def receive(self, index: int, group: int) -> None:
        """Make the current stream wait until all other ranks have written a group to this rank's buffer.

        The side stream then clears the flags; the current stream does not wait for that.
        """
        streams = self._streams
        writers = [rank for rank in range(self._axis.size) if rank != self._axis.index]
        flags = [self._flag(self._axis.index, index, group, writer) for writer in writers]
        for flag in flags:
            streams.await_flag(streams.current, flag)
        streams.await_stream(streams.side, streams.current)
        for flag in flags:
            streams.write_flag(streams.side, flag, 0)

    def finish(self) -> None:
        """Make the current stream wait until this rank's outgoing copies are done and its flags are cleared."""
        self._streams.await_stream(self._streams.current, self._streams.side)

    def _copy(self, rank: int, index: int, group: int, layout: _Layout) -> None:
        to, source = (self._memory.addresses[each] for each in (rank, self._axis.index))
        pitch = layout.token_bytes
        for row in range(layout.shape[0]):
            token = index * self.size + (row * layout.shape[1] + layout.first) * pitch
            for start, width in layout.parts(group):
                at = token + start
                self._streams.copy_rows(self._streams.side, to + at, source + at, pitch, width, layout.tokens)

    def _flag(self, rank: int, index: int, group: int, writer: int) -> int:
        """Address of the flag in `rank`'s memory that `writer` sets for a head group of a buffer."""
        flag = (index * MAX_GROUPS + group) * self._axis.size + writer
        return self._memory.addresses[rank] + NUM_BUFFERS * self.size + _FLAG_BYTES * flag
