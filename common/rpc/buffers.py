"""Buffers that are used again. Memory that the process already touched is what makes a large hop cheap.

Buffers are anonymous mappings, not bytearrays: those are zeroed when they are made, which for a large one holds up
the event loop, and would let a header that promises much cost as much. Not thread-safe: one pool, one event loop.
"""

from __future__ import annotations

import sys
from mmap import mmap

_GRAIN = 1 << 20
_UNSHARED = 2  # references that sys.getrefcount sees when only one local name holds an object


class BufferPool:
    """Hands out leases; keeps at most `idle_bytes` of memory between calls."""

    def __init__(self, idle_bytes: int = 256 << 20) -> None:
        self._idle_bytes = idle_bytes
        self._idle: list[mmap] = []

    @property
    def idle_bytes(self) -> int:
        """Memory that waits to be used again."""
        return sum(map(len, self._idle))

    def lease(self) -> BufferLease:
        """A set of buffers with one end of life."""
        return BufferLease(self)

    def take(self, size: int) -> mmap:
        """A buffer of at least `size` bytes: the smallest idle one that fits without wasting half, or a new one."""
        fitting = [buffer for buffer in self._idle if size <= len(buffer) <= max(2 * size, _GRAIN)]
        if not fitting:
            return mmap(-1, -(-size // _GRAIN) * _GRAIN)
        chosen = min(fitting, key=len)
        self._idle = [buffer for buffer in self._idle if buffer is not chosen]
        return chosen

    def give(self, buffer: mmap) -> None:
        """Keep a buffer that nobody looks at any more; the oldest idle ones make room."""
        self._idle.append(buffer)
        while self.idle_bytes > self._idle_bytes:
            self._idle.pop(0)


class BufferLease:
    """Buffers of one call. `close` returns them to the pool, except those that something still refers to.

    A tensor laid over a buffer refers to it, so a stage that keeps a tensor costs the pool a buffer, never its content.
    """

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._buffers: list[mmap] = []
        self._views: list[memoryview] = []

    def take(self, size: int) -> tuple[mmap, memoryview]:
        """A buffer, and a view of its first `size` bytes that dies with the lease."""
        buffer = self._pool.take(size)
        view = memoryview(buffer)[:size]
        self._buffers.append(buffer)
        self._views.append(view)
        return buffer, view

    def close(self) -> None:
        """End the lease; again is harmless."""
        while self._views:
            self._views.pop().release()
        while self._buffers:
            buffer = self._buffers.pop()
            if sys.getrefcount(buffer) <= _UNSHARED:
                self._pool.give(buffer)
