"""Streams of artifacts while a pipeline runs: between runners, and from an event loop to the thread of a stage."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from common.errors import InternalError
from common.stage import Call

STREAM_BYTES = 32 << 20
"""Most bytes of a stream that its reader has not read yet, beside one item; beyond it the writer waits."""
_POLL_SECONDS = 0.05


class ItemBuffer:
    """The items of one stream of a running pipeline, each kept until the buffer is dropped.

    A reader begins with the first item, so that work which was lost with a worker can be done again. The writer waits
    while the reader is more than `max_unread_bytes` behind. One task writes and one reads, on the same event loop.
    """

    def __init__(self, max_unread_bytes: float = STREAM_BYTES) -> None:
        self._max_unread_bytes = max_unread_bytes
        self._items: list[tuple[Any, int]] = []
        self._most_read = 0
        self._unread_bytes = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Append the item with this index; one that is there already is ignored. Returns once the writer may go on.

        Raises InternalError where an item was left out.
        """
        if index > len(self._items):
            raise InternalError(f"item {index} of a stream came where item {len(self._items)} is next")
        if index == len(self._items):
            self._items.append((item, byte_size))
            self._unread_bytes += byte_size
            self._notify()
        while self._unread_bytes > self._max_unread_bytes:
            await self._changed.wait()

    def close(self) -> None:
        """No more items will come."""
        self._is_closed = True
        self._notify()

    async def wait_for_first(self) -> None:
        """Return once there is an item to read, or there will be none."""
        while not self._items and not self._is_closed:
            await self._changed.wait()

    async def read(self, *, forgets: bool = False) -> AsyncIterator[tuple[Any, int]]:
        """Yield all items in order, each with its size in bytes, until the stream is closed.

        A reader that `forgets` will not begin again: each item is dropped once it is read.
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
    """A stream input of a stage: filled on the event loop, iterated once on the stage's thread.

    At most `max_bytes` wait to be taken, beside one item. `unpack` makes the artifact, on the stage's thread.
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
        """Append an item, and return once at most `max_bytes` wait to be taken."""
        with self._condition:
            self._items.append((item, byte_size))
            self._bytes += byte_size
            self._condition.notify()
        while self._bytes > self._max_bytes:
            self._taken.clear()
            if self._bytes > self._max_bytes:
                await self._taken.wait()

    def close(self, error: BaseException | None = None) -> None:
        """End the stream; with an error, the stage raises it when it asks for the next item."""
        with self._condition:
            self._is_closed, self._error = True, error
            self._condition.notify()

    def has_next(self) -> bool:
        """Whether an item is there, so that the stage would not wait for it."""
        with self._condition:
            return bool(self._items)

    def __iter__(self) -> Iterator[Any]:
        """Yield the artifacts in order. Raises the error of close(), and as check_cancelled while it waits."""
        while (taken := self._take()) is not None:
            yield self._unpack(taken[0])

    def _take(self) -> tuple[Any, int] | None:
        """The next item; None after the last."""
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
    """Run `work` on the event loop and wait for it on the stage's thread, until the call is cancelled at the latest."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    with call.waiting():
        while not futures.wait({future}, _POLL_SECONDS).done:
            left = call.seconds_left()
            if call.cancelled.is_set() or (left is not None and left <= 0):
                future.cancel()
                return
    future.result()


def call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Run `callback` on the event loop, from another thread; do nothing where the loop has ended."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return


class DeviceLock:
    """The right to compute on a device: one thread has it at a time, and those that wait get it in their order."""

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
        """Release the device while its holder waits, and acquire it again afterwards."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


@runtime_checkable
class _HasBytes(Protocol):
    """A tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""


def byte_size_of(value: Any) -> int:
    """Bytes of the tensors and texts in an artifact."""
    if dataclasses.is_dataclass(value):
        return sum(byte_size_of(vars(value)[each.name]) for each in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return sum(map(byte_size_of, value.values()))
    if isinstance(value, tuple | list):
        return sum(map(byte_size_of, value))
    if isinstance(value, str | bytes):
        return len(value)
    return value.nbytes if isinstance(value, _HasBytes) else 0
