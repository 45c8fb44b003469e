"""Converts the reports of a stage on the device thread to frames, which the event loop sends."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, cast

from google.protobuf.message import Message

from common.codec import TensorLeaf, pack
from common.rpc.framing import Packet, chunk_frames
from common.rpc.items import item_frames
from common.stage import STEP_CHECKPOINTS, Call
from common.streams import STREAM_BYTES, byte_size_of, wait_on_thread

_MAX_WAITING = 256  # progress is dropped while at least this number of frames is queued
_LONGEST_BEGUN_SECONDS = 1.0


@dataclass(frozen=True)
class _Item:
    """A queued item."""

    slot: str
    index: int
    artifact: Any
    byte_size: int


class FrameReporter:
    """Queue of the frames that a call sends while its stages run.

    The queue is bounded for slow clients: progress is dropped while many frames are queued, a step checkpoint replaces
    a queued step checkpoint, and other items block the stage while more than `max_bytes` of items are queued. Progress
    within `step_seconds` of the last sent progress is dropped too, because each progress frame wakes three processes.
    Progress of the last step is never dropped. begin() sends the frame `begun`, if it is not None. Without
    `sends_items`, step checkpoints are sent in Checkpoint frames, and other streams are dropped.
    """

    def __init__(
        self,
        frame: type[Message],
        leaf: TensorLeaf,
        *,
        step_seconds: float = 0.0,
        begun: bytes | None = None,
        sends_items: bool = True,
        max_bytes: int = STREAM_BYTES,
    ) -> None:
        self._type = frame
        self._frame = cast(Any, frame)
        self._leaf = leaf
        self._step_seconds = step_seconds
        self._next_step = 0.0
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | _Item | None] = asyncio.Queue()
        fields = frame.DESCRIPTOR.fields_by_name
        self._sends_items = sends_items and "item" in fields
        self._sends_checkpoints = self._sends_items or STEP_CHECKPOINTS in fields
        self._checkpoint: _Item | None = None
        self._lock = threading.Lock()
        self._begun = begun
        self._begun_sent = threading.Event()
        self._max_bytes = max_bytes
        self._waiting_bytes = 0
        self._sent = asyncio.Event()

    def begin(self) -> None:
        """Send `begun` and wait until it is written, for at most 1 s. Called on the device thread.

        A stage may crash the process within a millisecond; the caller must know that the stage had started.
        """
        if self._begun is not None:
            self._put(self._begun)
            self._begun_sent.wait(_LONGEST_BEGUN_SECONDS)

    def release(self) -> None:
        """Unblock begin(), because no more frames are sent."""
        self._begun_sent.set()

    def listen(self, call: Call) -> Call:
        """Return the call with callbacks that report to this queue."""

        def on_item(slot: str, index: int, artifact: Any) -> None:
            if slot == STEP_CHECKPOINTS:
                self._put_checkpoint(_Item(slot, index, artifact, 0))
            elif self._sends_items:
                item = _Item(slot, index, artifact, byte_size_of(artifact))
                wait_on_thread(self._loop, self._put_item(item), call)

        return dataclasses.replace(
            call, on_progress=self._progress, on_warning=self._warning, on_item=on_item, emitted={}
        )

    def end(self) -> None:
        """Mark the end of the frames. Called on the event loop."""
        self._queue.put_nowait(None)

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield the frames in order, until end(). Frames of an item are created one at a time."""
        while (queued := await self._queue.get()) is not None:
            if isinstance(queued, bytes):
                yield queued
                if queued is self._begun:
                    self._begun_sent.set()
                continue
            item = self._newest(queued)
            # On a thread, because pack() computes checksums of large tensors.
            packet = await asyncio.to_thread(pack, item.slot, item.artifact, self._leaf)
            for frame in self._item_frames(item, packet):
                yield frame
            self._waiting_bytes -= item.byte_size
            self._sent.set()

    def _item_frames(self, item: _Item, packet: Packet) -> Iterator[bytes]:
        if self._sends_items:
            yield from item_frames(self._type, item.slot, item.index, packet)
            return
        frame = self._frame()
        frame.checkpoint.state.CopyFrom(packet.message)
        yield frame.SerializeToString()
        yield from chunk_frames(packet.chunks)

    def _newest(self, queued: _Item) -> _Item:
        """Return the item to send for a queued item: for a step checkpoint, the latest step checkpoint."""
        if queued.slot != STEP_CHECKPOINTS:
            return queued
        with self._lock:
            newest, self._checkpoint = self._checkpoint, None
        return newest or queued

    def _put(self, item: bytes | _Item) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def _put_item(self, item: _Item) -> None:
        """Queue an item, and wait until at most `max_bytes` are queued."""
        self._waiting_bytes += item.byte_size
        self._queue.put_nowait(item)
        while self._waiting_bytes > self._max_bytes:
            self._sent.clear()
            await self._sent.wait()

    def _put_checkpoint(self, item: _Item) -> None:
        """Queue a step checkpoint without waiting. Its tensors need no copy, because the stage does not modify them."""
        if not self._sends_checkpoints:
            return
        with self._lock:
            waits, self._checkpoint = self._checkpoint is not None, item
        if not waits:
            self._put(item)

    def _progress(self, step: int, total_steps: int) -> None:
        now = time.monotonic()
        if step == total_steps or (now >= self._next_step and self._queue.qsize() < _MAX_WAITING):
            self._next_step = now + self._step_seconds
            frame = self._frame()
            frame.progress.step, frame.progress.total_steps = step, total_steps
            self._put(frame.SerializeToString())

    def _warning(self, field: str, message: str) -> None:
        frame = self._frame()
        frame.warning.field, frame.warning.message = field, message
        self._put(frame.SerializeToString())
