"""Turns what a stage tells its Call, on the device thread, into frames that the event loop sends."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, cast

from google.protobuf.message import Message

from common.artifacts import StepCheckpoint
from common.codec import TensorLeaf, pack
from common.rpc.framing import chunk_frames
from common.rpc.method import STEP_CHECKPOINT
from common.stage import Call

_MAX_WAITING = 256
_LONGEST_BEGUN_SECONDS = 1.0


class FrameReporter:
    """The frames that a call sends while its stages run.

    A client that reads slowly gets fewer of them, never a growing queue: progress is left out while many frames wait,
    and so is a checkpoint while the one before it waits, since an older checkpoint is as valid, except the last one of
    a call that is handed over: its steps are not done again. Steps that come within
    `step_seconds` of one that was told are left out too, except the last: each would wake three processes.
    begin() sends the frame `begun`, if there is one.
    """

    def __init__(
        self, frame: type[Message], leaf: TensorLeaf, *, step_seconds: float = 0.0, begun: bytes | None = None
    ) -> None:
        self._frame = cast(Any, frame)
        self._leaf = leaf
        self._step_seconds = step_seconds
        self._next_step = 0.0
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | StepCheckpoint | None] = asyncio.Queue()
        self._checkpoints = STEP_CHECKPOINT in frame.DESCRIPTOR.fields_by_name
        self._checkpoint_waits = False
        self._hands_over = threading.Event()
        self._begun = begun
        self._begun_sent = threading.Event()

    def begin(self) -> None:
        """Send `begun`, and return once it is written, or after a second. Called on the device thread.

        A stage may kill its process within its first millisecond, and the caller must know by then that it ran.
        """
        if self._begun is not None:
            self._put(self._begun)
            self._begun_sent.wait(_LONGEST_BEGUN_SECONDS)

    def release(self) -> None:
        """Stop waiting for `begun` to be written: nothing is sent any more."""
        self._begun_sent.set()

    def listen(self, call: Call) -> Call:
        """The same call, telling this reporter."""
        self._hands_over = call.hand_over
        return dataclasses.replace(
            call, on_progress=self._progress, on_warning=self._warning, on_step_checkpoint=self._checkpoint
        )

    def end(self) -> None:
        """No more frames. Called on the event loop."""
        self._queue.put_nowait(None)

    async def frames(self) -> AsyncIterator[bytes]:
        """The frames in order, until the end. Those of a checkpoint are made one at a time, as they are sent."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, bytes):
                yield item
                if item is self._begun:
                    self._begun_sent.set()
                continue
            packet = await asyncio.to_thread(pack, STEP_CHECKPOINT, item, self._leaf)  # checksums of many bytes
            frame = self._frame()
            frame.checkpoint.state.CopyFrom(packet.message)
            yield frame.SerializeToString()
            for chunk in chunk_frames(packet.chunks):
                yield chunk
            self._checkpoint_waits = False

    def _put(self, item: bytes | StepCheckpoint) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

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

    def _checkpoint(self, state: StepCheckpoint) -> None:
        """Taken as it is: its tensors are not written to any more, and the loop need not wait for them to be sent."""
        if self._checkpoints and (self._hands_over.is_set() or not self._checkpoint_waits):
            self._checkpoint_waits = True
            self._put(state)
