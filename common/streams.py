"""Streams of artifacts between the runners of a pipeline, and from an event loop to a stage's thread."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any, Protocol, Self, runtime_checkable

from common.errors import InternalError
from common.stage import Call

STREAM_BYTES = 32 << 20
"""Maximum unread bytes of a stream, in addition to one item. Beyond it, the writer waits."""
_POLL_SECONDS = 0.05


class ItemBuffer:
    """Stores all items of one stream of a running pipeline, until the buffer is released.

    Each reader starts with the first item, so that work that was lost with a worker can be repeated. The writer waits
    while more than `max_unread_bytes` are unread. Use one writer task and one reader task, on the same event loop.
    """

    def __init__(self, max_unread_bytes: float = STREAM_BYTES) -> None:
        self._max_unread_bytes = max_unread_bytes
        self._items: list[tuple[Any, int]] = []
        self._most_read = 0
        self._unread_bytes = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Append an item, and wait while too many bytes are unread. An index that is already stored is ignored.

        Raises InternalError if an index was skipped.
        """
        if index > len(self._items):
            raise InternalError(f"item {index} of a stream was received instead of item {len(self._items)}")
        if index == len(self._items):
            self._items.append((item, byte_size))
            self._unread_bytes += byte_size
            self._notify()
        while self._unread_bytes > self._max_unread_bytes:
            await self._changed.wait()

    def close(self) -> None:
        """Mark the end of the stream."""
        self._is_closed = True
        self._notify()

    async def wait_for_first(self) -> None:
        """Wait until the first item is stored or the stream is closed."""
        while not self._items and not self._is_closed:
            await self._changed.wait()

    async def read(self, *, forgets: bool = False) -> AsyncIterator[tuple[Any, int]]:
        """Yield all items in order, each with its size in bytes, until the stream is closed.

        With `forgets`, each item is released once it is read, so that the stream cannot be read again.
        """
        position = 0
        while True:
            while position == len(self._items):
                if self._is_closed:
                    return
                await self._changed.wait()
            item, byte_size = self._items[position]
            position += 1
            if position > self._most_read:
                self._most_read = position
                self._unread_bytes -= byte_size
                self._notify()
            if forgets:
                self._items[position - 1] = (None, byte_size)
            yield item, byte_size
            del item

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class StreamFeed:
    """Input stream of a stage: filled on the event loop, iterated once on the stage's thread.

    At most `max_bytes` and one item are buffered. `unpack` converts an item to an artifact, on the stage's thread.
    """

    def __init__(
        self, call: Call, unpack: Callable[[Any], Any] = lambda item: item, max_bytes: int = STREAM_BYTES
    ) -> None:
        self._call = call
        self._unpack = unpack
        self._max_bytes = max_bytes
        self._loop = asyncio.get_running_loop()
        self._taken = asyncio.Event()
        self._condition = threading.Condition()
        self._items: deque[tuple[Any, int]] = deque()
        self._bytes = 0
        self._is_closed = False
        self._error: BaseException | None = None

    async def put(self, item: Any, byte_size: int) -> None:
        """Append an item, and wait until at most `max_bytes` are buffered."""
        with self._condition:
            self._items.append((item, byte_size))
            self._bytes += byte_size
            self._condition.notify()
        while self._bytes > self._max_bytes:
            self._taken.clear()
            if self._bytes > self._max_bytes:
                await self._taken.wait()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream. An `error` is raised on the stage's thread when it reads the next item."""
        with self._condition:
            self._is_closed, self._error = True, error
            self._condition.notify()

    def has_next(self) -> bool:
        """Return whether an item is available without blocking."""
        with self._condition:
            return bool(self._items)

    def __iter__(self) -> Iterator[Any]:
        """Yield the artifacts in order. Raises the errors of close() and of Call.check_cancelled()."""
        while (taken := self._take()) is not None:
            yield self._unpack(taken[0])

    def _take(self) -> tuple[Any, int] | None:
        """Return the next item; None after the last."""
        with self._call.waiting():
            while True:
                with self._condition:
                    if not self._items and not self._is_closed:
                        self._condition.wait(_POLL_SECONDS)
                    if self._items:
                        taken = self._items.popleft()
                        self._bytes -= taken[1]
                        break
                    if self._error is not None:
                        raise self._error
                    if self._is_closed:
                        return None
                self._call.check_cancelled()
        call_on(self._loop, self._taken.set)
        return taken


def wait_on_thread(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None], call: Call) -> None:
    """Run `work` on the event loop and block the stage's thread until it ends.

    Cancels `work` and returns if the call is cancelled or its deadline passes.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop)
    with call.waiting():
        while not futures.wait({future}, _POLL_SECONDS).done:
            left = call.seconds_left()
            if call.cancelled.is_set() or (left is not None and left <= 0):
                future.cancel()
                return
    future.result()


def call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Run `callback` on the event loop, from another thread. No effect if the loop is closed."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return


class DeviceLock:
    """Fair lock on a device: waiting threads acquire it in FIFO order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_held = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_held:
                self._is_held = True
                return
            granted = threading.Event()
            self._waiting.append(granted)
        granted.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_held = False

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release the lock within the block, and acquire it again afterwards."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


@runtime_checkable
class _HasBytes(Protocol):
    """A tensor or array."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""


@runtime_checkable
class _Strided(Protocol):
    """A tensor with strides."""

    def is_contiguous(self) -> bool:
        """Return whether the elements are in row-major order without gaps."""

    def contiguous(self) -> Self:
        """Return this tensor, or a contiguous copy."""


def densified(value: Any) -> Any:
    """Return an artifact with contiguous tensors, as it arrives in another process.

    Strides affect the choice of GEMM kernels, which round differently. If artifacts within a process retained their
    strides, results would depend on the assignment of stages to processes. Returns `value` itself if its tensors are
    contiguous.
    """
    if isinstance(value, _Strided):
        return value.contiguous()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        new = {name: densified(each) for name, each in old.items()}
        changed = {name: each for name, each in new.items() if each is not old[name]}
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        entries = {key: densified(each) for key, each in value.items()}
        return entries if any(entries[key] is not value[key] for key in entries) else value
    if isinstance(value, tuple | list):
        items = [densified(each) for each in value]
        return type(value)(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def byte_size_of(value: Any) -> int:
    """Return the total size of the tensors and strings in an artifact, in bytes. A character counts as 1 byte."""
    if dataclasses.is_dataclass(value):
        return sum(byte_size_of(vars(value)[each.name]) for each in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return sum(map(byte_size_of, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(byte_size_of, value))
    if isinstance(value, str | bytes):
        return len(value)
    return value.nbytes if isinstance(value, _HasBytes) else 0
