"""Pool of reusable receive buffers. Reusing memory avoids page faults, which dominate the cost of large transfers.

Buffers are anonymous mappings, not bytearrays. Zeroing a new bytearray would block the event loop. It would also
commit memory for the size in a header before the payload arrives. Not thread-safe: use one pool per event loop.
"""

from __future__ import annotations

import sys
from mmap import mmap

_GRAIN = 1 << 20
"""Buffer sizes are multiples of this number of bytes."""
_UNSHARED = 2  # sys.getrefcount() of an object that only one local variable refers to


class BufferPool:
    """Pool of buffers. Retains at most `max_idle_bytes` of unused memory."""

    def __init__(self, max_idle_bytes: int = 256 << 20) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[mmap] = []

    @property
    def idle_bytes(self) -> int:
        """Size of the unused buffers in bytes."""
        return sum(map(len, self._idle))

    def lease(self) -> BufferLease:
        """Return a lease: buffers that are returned to the pool together."""
        return BufferLease(self)

    def take(self, size: int) -> mmap:
        """Return the smallest unused buffer of `size` to 2 * `size` bytes, or of 1 MiB, else a new buffer."""
        fitting = [buffer for buffer in self._idle if size <= len(buffer) <= max(2 * size, _GRAIN)]
        if not fitting:
            return mmap(-1, -(-size // _GRAIN) * _GRAIN)
        chosen = min(fitting, key=len)
        self._idle = [buffer for buffer in self._idle if buffer is not chosen]
        return chosen

    def give(self, buffer: mmap) -> None:
        """Return an unreferenced buffer to the pool. Evicts the oldest unused buffers beyond `max_idle_bytes`."""
        self._idle.append(buffer)
        while self.idle_bytes > self._max_idle_bytes:
            self._idle.pop(0)


class BufferLease:
    """Buffers of one call. close() returns them to the pool, except buffers that are still referenced.

    A tensor that uses a buffer as storage references it. If a stage retains the tensor, the buffer is not
    returned to the pool, and the tensor remains valid.
    """

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._buffers: list[mmap] = []
        self._views: list[memoryview] = []

    def take(self, size: int) -> tuple[mmap, memoryview]:
        """Return a buffer, and a view of its first `size` bytes that close() releases."""
        buffer = self._pool.take(size)
        view = memoryview(buffer)[:size]
        self._buffers.append(buffer)
        self._views.append(view)
        return buffer, view

    def close(self) -> None:
        """End the lease. Idempotent."""
        while self._views:
            self._views.pop().release()
        while self._buffers:
            buffer = self._buffers.pop()
            if sys.getrefcount(buffer) <= _UNSHARED:
                self._pool.give(buffer)
