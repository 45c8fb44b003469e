"""State of one call of a stage service, shared by the event loop and the device thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from traceback import clear_frames

from common.errors import HandedOver, Unavailable
from common.rpc.buffers import BufferLease
from common.rpc.framing import Packet
from common.rpc.hand_over import StepTimes
from common.stage import Call
from common.streams import StreamFeed, call_on
from common.trace_context import NO_SPAN, current_span

_NOT_BEGUN = "this worker drains; the call is handed over before its stages started"


def do_nothing() -> None:
    """Do nothing: the default callback."""


class StageJob:
    """Work of one call on the device thread, and the call's receive buffers.

    The buffers are released when the work ends, which may be after the end of the call.
    `begun`: Begun frame to send when the work starts; None if the caller does not accept it. `reads_items`: the caller
    accepts StreamItem frames. `waiting`: span from the queueing of the work to its start. `seconds`: compute time of
    the stages, without `waited_seconds`, the time in which the stages wait for other workers.
    """

    def __init__(self, lease: BufferLease, call: Call, begun: bytes | None, *, reads_items: bool) -> None:
        self.lease = lease
        self.call = call
        self.begun = begun
        self.reads_items = reads_items
        self.inputs: dict[str, Packet] = {}
        self.feeds: dict[str, StreamFeed] = {}
        self.waited_seconds = 0.0
        self.seconds = 0.0
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
        """Queue the work. `on_end` is called on the event loop when the work has ended or fail() was called.

        Raises HandedOver if hand_over() was called before.
        """
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self._end = partial(call_on, asyncio.get_running_loop(), on_end)
        self._future = executor.submit(_without_frame_references, work)
        self._future.add_done_callback(lambda _: self._end())

    def timed(self, call: Call) -> Call:
        """Return the call with a progress callback that measures the step times."""

        def progress(step: int, total_steps: int) -> None:
            self.step_times.step(time.monotonic())
            current_span().event("step", step=step, total_steps=total_steps)
            call.on_progress(step, total_steps)

        return replace(call, on_progress=progress)

    def begin(self) -> None:
        """Record the start of the stages on the device thread. Raises HandedOver if hand_over() was called before."""
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self.has_begun = True
        self.step_times.begin(time.monotonic())

    @property
    def is_asked(self) -> bool:
        """Whether hand_over() was called."""
        return self.call.hand_over.is_set()

    def hand_over(self) -> None:
        """End the call with HandedOver, at the next step boundary if its stages have started."""
        self.call.hand_over.set()
        if self._future is not None and self._future.cancel():
            self._failure = HandedOver(_NOT_BEGUN)

    def fail(self, reason: str) -> None:
        """Cancel the work and end the call as UNAVAILABLE, without waiting for the device thread. Thread-safe."""
        self._failure = Unavailable(reason)
        self.call.cancelled.set()
        self._end()

    def result(self) -> dict[str, Packet]:
        """Return the result of the work. Raises the error of the work, of fail() or of hand_over()."""
        if self._future is None:
            raise AssertionError("start() was not called")
        if self._failure is not None and (
            not self._future.done() or self._future.cancelled() or self._future.exception() is not None
        ):
            raise self._failure
        return self._future.result()

    def abandon(self) -> None:
        """Cancel the work if it runs, and release the buffers once it has ended."""
        self.call.cancelled.set()
        self.waiting.end()
        self.inputs.clear()
        if self._future is None or self._future.cancel() or self._future.done():
            self.lease.close()
        else:
            loop = asyncio.get_running_loop()
            self._future.add_done_callback(lambda _: call_on(loop, self.lease.close))


def _without_frame_references(work: Callable[[], dict[str, Packet]]) -> dict[str, Packet]:
    """Run the work. Clears the frames of an error's traceback, so that the error does not reference tensors.

    Referenced tensors would occupy device memory and the call's receive buffers.
    """
    try:
        return work()
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise
