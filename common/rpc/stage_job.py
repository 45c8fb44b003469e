"""A call of a stage service on its way through the device thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from traceback import clear_frames

from common.errors import HandedOver, Unavailable
from common.rpc.buffers import BufferLease
from common.rpc.framing import Packet
from common.rpc.hand_over import StepTimes
from common.stage import Call
from common.streams import StreamFeed
from common.trace_context import NO_SPAN, current_span

_NOT_BEGUN = "this worker leaves; the call is handed over before it began"


def do_nothing() -> None:
    """Ignore an event."""


class StageJob:
    """One call's work on the device thread, and the buffers that it reads, which outlive the call if need be.

    `begun` is the frame to send when the work starts; None for a caller that does not know such frames. `reads_items`
    is whether the caller reads items of streams. `seconds` counts no time in which the work waited for other workers.
    """

    def __init__(self, lease: BufferLease, call: Call, begun: bytes | None, *, reads_items: bool) -> None:
        self.lease = lease
        self.call = call
        self.begun = begun
        self.reads_items = reads_items
        self.inputs: dict[str, Packet] = {}
        self.feeds: dict[str, StreamFeed] = {}
        self.waited_seconds = 0.0
        self.seconds = 0.0  # that the stages took, also where they raised an error
        self.request_id = call.request_id
        self.step_times = StepTimes()
        self.has_begun = False
        self.waiting = NO_SPAN
        self._failure: Unavailable | None = None
        self._end: Callable[[], None] = do_nothing
        self._future: Future[dict[str, Packet]] | None = None

    def start(
        self, executor: ThreadPoolExecutor, work: Callable[[], dict[str, Packet]], on_end: Callable[[], None]
    ) -> None:
        """Queue the work; on_end is called on the event loop once it has ended, however, or fail() was called.

        Raises HandedOver where the call was asked for that before.
        """
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self._end = partial(_call_on, asyncio.get_running_loop(), on_end)
        self._future = executor.submit(_holding_nothing, work)
        self._future.add_done_callback(lambda _: self._end())

    def timed(self, call: Call) -> Call:
        """The same call, whose steps are timed."""

        def progress(step: int, total_steps: int) -> None:
            self.step_times.step(time.monotonic())
            current_span().event("step", step=step, total_steps=total_steps)
            call.on_progress(step, total_steps)

        return replace(call, on_progress=progress)

    def begin(self) -> None:
        """The stages start, on the device thread. Raises HandedOver where the call was asked for that before."""
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self.has_begun = True
        self.step_times.begin(time.monotonic())

    @property
    def is_asked(self) -> bool:
        """Whether the call is being handed over."""
        return self.call.hand_over.is_set()

    def hand_over(self) -> None:
        """End with HandedOver: at once where the device thread has not begun, else at the next step boundary."""
        self.call.hand_over.set()
        if self._future is not None and self._future.cancel():
            self._failure = HandedOver(_NOT_BEGUN)

    def fail(self, reason: str) -> None:
        """Cancel the work, and end the call as UNAVAILABLE without waiting for the device thread. Thread-safe."""
        self._failure = Unavailable(reason)
        self.call.cancelled.set()
        self._end()

    def result(self) -> dict[str, Packet]:
        """What the work returned; raises what it raised, or the error of fail()."""
        if self._future is None:
            raise AssertionError("not started")
        if self._failure is not None and (
            not self._future.done() or self._future.cancelled() or self._future.exception() is not None
        ):
            raise self._failure
        return self._future.result()

    def abandon(self) -> None:
        """Stop the work within a step if it still runs, and free the buffers once it has ended."""
        self.call.cancelled.set()
        self.waiting.end()
        self.inputs.clear()
        if self._future is None or self._future.cancel() or self._future.done():
            self.lease.close()
        else:
            loop = asyncio.get_running_loop()
            self._future.add_done_callback(lambda _: _call_on(loop, self.lease.close))


def _holding_nothing(work: Callable[[], dict[str, Packet]]) -> dict[str, Packet]:
    """Do the work. An error that it ends with keeps its traceback, but not the tensors that its frames refer to.

    Those lie over the call's buffers, which could else not be used again, and fill the device's memory.
    """
    try:
        return work()
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call `callback` on the event loop. A loop that ended before the device thread's work is ignored."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)
