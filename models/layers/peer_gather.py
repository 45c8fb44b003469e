"""Gathers keys and values that the GPUs of one host share, by their copy engines: no multiprocessor takes part.

Each rank has places for what all ranks hold, in memory that its peers may write to. A rank writes its own chunk into
its own place, copies it from there into every other rank's, and raises a flag there; who wants to read waits for the
flags. Copies, flags and waits are operations of streams, so that CUDA graphs take them and products run meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.layers.attention import KeyValues, attention
from models.layers.mesh import Axis

PLACES = 2
"""Used in turn by one layer of attention after the other: see PeerGather."""

MOST_GROUPS = 2
"""Of heads, that travel behind each other."""

LEAST_WORK_OF_GROUPS = 350_000
"""Products of heads and tokens from which on groups are worth it.

Each must leave 132 multiprocessors, and tiles of 128 queries, an even share.
"""

ALIGNMENT = 512
"""Bytes."""


class PeerGather:
    """Memory for keys and values of all ranks of an axis, on each of them.

    A place is written again two layers later. By then every rank has read it: a peer writes for a layer only when it
    has what this rank sent for the layer before, and this rank sent that after it had attended in the layer before
    that one. The last layers of a forward and the first of the next are kept apart by the join of what the forward
    computed. All ranks call its methods in the same order.
    """

    def __init__(self, axis: Axis, device: torch.device) -> None:
        self._axis = axis
        self._device = device
        self._memory: list[_Memory] = []
        self._layers = 0

    def key_values(self, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Gathered:
        """A way for keys and values (B, L, H, K) of this rank, where the ranks hold `sizes` tokens."""
        batch, tokens, heads, size = k.shape
        assert tokens == sizes[self._axis.index], "a chunk of another size than was told"
        form = _Form((batch, sum(sizes), 2, heads, size), k.dtype, sum(sizes[: self._axis.index]), tokens)
        memory = self._memory_for(form.bytes)
        self._layers += 1
        return Gathered(k, v, memory, self._layers % PLACES, form)

    def _memory_for(self, needed: int) -> _Memory:
        """The latest memory, or a larger one: graphs may still use the smaller ones, which are kept."""
        if not self._memory or self._memory[-1].place_bytes < needed:
            self._memory.append(_Memory(self._axis, self._device, needed))
        return self._memory[-1]


@dataclass(frozen=True)
class _Form:
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
        """Halves where attention to each still fills all multiprocessors evenly; else one group."""
        batch, tokens, _, heads, _ = self.shape
        return MOST_GROUPS if heads % MOST_GROUPS == 0 and batch * tokens * heads >= LEAST_WORK_OF_GROUPS else 1


class Gathered(KeyValues):
    """Keys and values of one layer on their way into the places of all ranks."""

    def __init__(self, k: Tensor, v: Tensor, memory: _Memory, place: int, form: _Form) -> None:
        super().__init__(k, v)
        self._memory = memory
        self._place = place
        self._form = form
        self._whole = memory.view(place, form)
        self.room = self._whole.narrow(1, form.first, form.tokens)

    def send(self) -> None:
        self._memory.send(self._place, self._form)

    def attend(self, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Queries (B, L, H, K) to the keys of all ranks, one group of heads after the other."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        groups = self._form.groups
        for group, (queries, k, v, result) in enumerate(
            zip(*(each.chunk(groups, dim=2) for each in (q, *self._whole.unbind(2), out)), strict=True)
        ):
            self._memory.receive(self._place, group)
            if q.shape[1]:
                attention(queries, k, v, out=result)
        self._memory.finish()
        return out


class _Memory:
    """The places of one size, of all ranks, and their flags: a place has some for each rank that writes to it."""

    def __init__(self, axis: Axis, device: torch.device, place_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        self.axis = axis
        self.place_bytes = -(-place_bytes // ALIGNMENT) * ALIGNMENT
        self._flags_at = PLACES * self.place_bytes
        # The priority lets its copies start before what else is ready to run.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        flags = PLACES * MOST_GROUPS * axis.size
        self._own = symmetric_memory.empty(self._flags_at + 4 * flags, dtype=torch.uint8, device=device).zero_()
        self._handle = symmetric_memory.rendezvous(self._own, axis.group)  # type: ignore[arg-type]
        # No rank writes before all have lowered their flags.
        self._handle.barrier()
        torch.cuda.synchronize(device)

    def view(self, place: int, form: _Form) -> Tensor:
        """What this rank has in a place."""
        start = place * self.place_bytes
        return self._own[start : start + form.bytes].view(form.dtype).view(form.shape)

    def send(self, place: int, form: _Form) -> None:
        """Copy this rank's tokens to the same place of every other rank, and tell them, group by group."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for group in range(form.groups):
            for offset in range(1, self.axis.size):
                # The next rank first, so that no two ranks begin with the same one.
                rank = (self.axis.index + offset) % self.axis.size
                if form.tokens:
                    self._copy(rank, place, group, form)
                _write(self._stream, self._flag(rank, place, group, self.axis.index), 1)
        self._sent.record(self._stream)

    def receive(self, place: int, group: int) -> None:
        """Let the current stream wait until all have written a group to a place of this rank; lower their flags."""
        stream = torch.cuda.current_stream()
        for rank in range(self.axis.size):
            if rank != self.axis.index:
                flag = self._flag(self.axis.index, place, group, rank)
                _wait_for_one(stream, flag)
                _write(stream, flag, 0)

    def finish(self) -> None:
        """Let the current stream wait until all that was sent has been read here."""
        torch.cuda.current_stream().wait_event(self._sent)

    def _copy(self, rank: int, place: int, group: int, form: _Form) -> None:
        """Keys and values of a group of heads to the same place of another rank."""
        width = form.token_bytes // 2 // form.groups
        for row in range(form.shape[0]):
            token = place * self.place_bytes + (row * form.shape[1] + form.first) * form.token_bytes
            for at in (token + group * width, token + (form.groups + group) * width):
                to, source = (self._handle.buffer_ptrs[each] + at for each in (rank, self.axis.index))
                _copy_rows(self._stream, to, source, form.token_bytes, width, form.tokens)

    def _flag(self, rank: int, place: int, group: int, writer: int) -> int:
        """The address of a flag that a rank has for what another one writes."""
        flags: int = self._handle.buffer_ptrs[rank] + self._flags_at
        return flags + 4 * ((place * MOST_GROUPS + group) * self.axis.size + writer)


def _copy_rows(stream: torch.cuda.Stream, to: int, source: int, pitch: int, width: int, rows: int) -> None:
    from cuda.bindings import runtime

    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    _check(runtime.cudaMemcpy2DAsync(to, pitch, source, pitch, width, rows, kind, stream.cuda_stream))


def _write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    from cuda.bindings import driver

    _check(driver.cuStreamWriteValue32(stream.cuda_stream, address, value, 0))


def _wait_for_one(stream: torch.cuda.Stream, address: int) -> None:
    from cuda.bindings import driver

    equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
    _check(driver.cuStreamWaitValue32(stream.cuda_stream, address, 1, equal))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]):
        raise RuntimeError(f"a copy between GPUs failed: {result[0].name}")
