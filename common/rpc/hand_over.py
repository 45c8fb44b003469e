"""Hands calls of a draining worker over to other workers at a step boundary, without losing steps.

A call is handed over once another worker with an equal numerics fingerprint has a free worker slot. Calls that still
run near the end of the grace period are handed over without a free worker slot. Their requests wait for a worker slot
and resume from their step checkpoints.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from common.errors import FleetError
from common.log_context import log_scope
from common.logs import get_logger

POLL_SECONDS = 1.0
"""Interval at which the number of free worker slots is polled."""
STEPS_AHEAD = 2
"""Maximum number of steps after hand_over(): the running step, and on CUDA an enqueued step."""
_MARGIN_SECONDS = 1.0  # maximum margin before the end of the grace period
_MARGIN_OF_GRACE = 0.1  # maximum margin as a fraction of the grace period
_NEWEST_STEPS = 4
_IDLE_SECONDS = 0.1

_log = get_logger(__name__)


class StepTimes:
    """Durations of the latest steps of one call. Times are time.monotonic() timestamps in seconds."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._seconds: deque[float] = deque(maxlen=_NEWEST_STEPS)

    def begin(self, now: float) -> None:
        """Record the start of the stages."""
        self._last = now

    def step(self, now: float) -> None:
        """Record a completed step."""
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    @property
    def longest(self) -> float:
        """Duration of the longest of the latest steps in seconds; 0 before the first step is completed."""
        return max(self._seconds, default=0.0)


class RunningCall(Protocol):
    """A call that the worker runs."""

    request_id: str
    step_times: StepTimes

    @property
    def has_begun(self) -> bool:
        """Whether the stages of the call have started."""

    @property
    def is_asked(self) -> bool:
        """Whether hand_over() was called."""

    def hand_over(self) -> None:
        """End the call with HandedOver, at the next step boundary if its stages have started."""


class HandOver:
    """Decides when each running call of a draining worker is handed over.

    `calls` returns the running calls. `free_slots` returns the number of free worker slots of live workers with an
    equal numerics fingerprint and an equal contract, and raises FleetError if the store is unavailable. Other draining
    workers may use the same worker slots: a request that finds no free worker slot waits in the queue, before other
    claims of its priority.
    """

    def __init__(
        self,
        calls: Callable[[], Sequence[RunningCall]],
        free_slots: Callable[[], Awaitable[int]],
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._calls = calls
        self._free_slots = free_slots
        self._poll_seconds = poll_seconds

    async def run(self, grace: float) -> None:
        """Hand calls over while worker slots are free, and all other calls before `grace` seconds end.

        Runs until cancelled.
        """
        end = time.monotonic() + grace
        margin = min(_MARGIN_SECONDS, _MARGIN_OF_GRACE * grace)
        poll_at = 0.0
        polling: asyncio.Task[int] | None = None
        try:
            while True:
                if not (remaining := self._unasked()):
                    await asyncio.sleep(_IDLE_SECONDS)
                    continue
                now = time.monotonic()
                due = {call: end - margin - STEPS_AHEAD * call.step_times.longest for call in remaining}
                for call in remaining:
                    if due[call] <= now:
                        self._ask(call, "the grace period ends")
                if polling is None and now >= poll_at:
                    polling = asyncio.create_task(self._free())
                    poll_at = now + self._poll_seconds
                until = min([poll_at, *due.values()]) - now
                if polling is None:
                    await asyncio.sleep(max(0.01, until))
                    continue
                await asyncio.wait({polling}, timeout=max(0.01, until))
                if polling.done():
                    self._hand_to(polling.result())
                    polling = None
        finally:
            if polling is not None:
                polling.cancel()

    async def _free(self) -> int:
        try:
            return await self._free_slots()
        except FleetError as error:
            _log.warning("number of free worker slots unknown", error=error)
            return 0

    def _unasked(self) -> list[RunningCall]:
        return [call for call in self._calls() if not call.is_asked]

    def _hand_to(self, free: int) -> None:
        """Hand over one call per free worker slot, minus hand-overs in progress. Calls that have not begun go first."""
        leaving = sum(call.is_asked for call in self._calls())
        for call in sorted(self._unasked(), key=lambda call: call.has_begun)[: max(0, free - leaving)]:
            self._ask(call, "another worker has a free worker slot")

    def _ask(self, call: RunningCall, reason: str) -> None:
        with log_scope(request_id=call.request_id):
            _log.info("call hand-over requested", reason=reason)
        call.hand_over()
