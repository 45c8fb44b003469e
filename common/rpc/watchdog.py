"""Detects stuck calls: calls that have reported steps and then report no step for too long.

Heartbeats continue while a kernel or a collective hangs, so that the store treats the worker as live. The watchdog
stores the time of each reported step, and checks these times on a separate thread. It cancels a stuck call, which ends
a stage that still checks for cancellation. If the call has not ended some seconds later, its thread cannot be
interrupted and the process exits; in a worker group, the other ranks detect this and exit too.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import Enum

from common.errors import InvalidInput
from common.logs import get_logger
from common.process_exit import exit_at_once
from common.stage import Call

_LONGEST_CHECK_SECONDS = 1.0
_CHECKS_PER_BOUND = 8
"""Minimum number of checks within the shorter of `seconds` and `exit_seconds`."""

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class HangLimits:
    """Limits that define a stuck call.

    After its first step, a call is stuck if it reports no step for `seconds` or for `mean_steps` times its mean step
    duration, whichever is longer. It is then cancelled, and has `exit_seconds` to end. Raises InvalidInput for a limit
    that is not positive.
    """

    seconds: float = 60.0
    mean_steps: float = 20.0
    exit_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise InvalidInput(f"hang_{name}: {value:g} is not more than 0; 60 works", field=f"hang_{name}")

    @property
    def check_seconds(self) -> float:
        """Interval of the checks in seconds."""
        return min(_LONGEST_CHECK_SECONDS, min(self.seconds, self.exit_seconds) / _CHECKS_PER_BOUND)


class Verdict(Enum):
    """Result of the check of a call."""

    LIVE = "the call reports steps, or has not reported its first step"
    STUCK = "the call has reported no step for too long and must be cancelled"
    CANCELLED = "the call was cancelled and has time left to end"
    LOST = "the call was cancelled and has not ended in time"


class StepWatch:
    """Step times of one call, in seconds of one monotonic clock.

    Time without checks does not count: the whole process was stopped or had no CPU time.
    """

    def __init__(self, limits: HangLimits, now: float) -> None:
        self._limits = limits
        self._began = self._since = self._checked = now
        self._steps = 0
        self._pauses = 0
        self._is_cancelled = False
        self.waited_seconds = 0.0
        """Time since the latest step, or since the cancel, as of the latest check."""
        self._lock = threading.Lock()

    def step(self, now: float) -> None:
        """Record a step."""
        with self._lock:
            self._steps += 1
            if not self._is_cancelled:
                self._since = now

    @contextmanager
    def paused(self, clock: Callable[[], float]) -> Iterator[None]:
        """Exclude the time of the block, in which the stage waits for other workers."""
        with self._lock:
            self._pauses += 1
        began = clock()
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if not self._is_cancelled:
                    waited = clock() - began
                    self._since, self._began = self._since + waited, self._began + waited

    @property
    def allowed_seconds(self) -> float:
        """Maximum time between two steps. The mean includes the first step and the time before it."""
        pace = (self._since - self._began) / max(1, self._steps)
        return max(self._limits.seconds, self._limits.mean_steps * pace)

    def check(self, now: float) -> Verdict:
        """Return the state of the call. Must be called every `limits.check_seconds`."""
        with self._lock:
            missed = now - self._checked - self._limits.check_seconds
            if missed > self._limits.check_seconds:
                self._since = min(now, self._since + missed)
                self._began = min(now, self._began + missed)
            self._checked = now
            self.waited_seconds = waited = now - self._since
            if self._is_cancelled:
                return Verdict.LOST if waited > self._limits.exit_seconds else Verdict.CANCELLED
            if not self._steps or self._pauses or waited <= self.allowed_seconds:
                return Verdict.LIVE
            self._is_cancelled = True
            self._since = now
            return Verdict.STUCK


@dataclass
class _Watched:
    """A watched call."""

    steps: StepWatch
    request_id: str
    thread: int
    on_stuck: Callable[[str], None]
    context: Context = field(default_factory=copy_context)
    """Context variables of the call, for its log lines."""
    is_stuck: bool = False


class Watchdog:
    """Watches the calls of one device: calls on the device thread, and sessions on separate threads.

    `on_lost` is called with the reason if a cancelled call does not end. Default: exit the process.
    """

    def __init__(
        self,
        limits: HangLimits,
        *,
        on_lost: Callable[[str], object] = exit_at_once,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._on_lost = on_lost
        self._clock = clock
        self._watched: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a stuck call was cancelled and has not ended."""
        return any(watched.is_stuck for watched in list(self._watched.values()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block, in which this thread's call waits for other workers."""
        watched = self._watched.get(threading.get_ident())
        with nullcontext() if watched is None else watched.steps.paused(self._clock):
            yield

    @contextmanager
    def watch(self, call: Call, on_stuck: Callable[[str], None]) -> Iterator[Call]:
        """Watch a call while the block runs on this thread. Yields the call with a progress callback for the watchdog.

        `on_stuck` is called once with the reason, on the watchdog's thread. It must cancel the call.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        steps = StepWatch(self._limits, self._clock())

        def progress(step: int, total_steps: int) -> None:
            steps.step(self._clock())
            call.on_progress(step, total_steps)

        thread = threading.get_ident()
        self._watched[thread] = _Watched(steps, call.request_id, thread, on_stuck)
        try:
            yield dataclasses.replace(call, on_progress=progress)
        finally:
            del self._watched[thread]

    def _run(self) -> None:
        while True:
            time.sleep(self._limits.check_seconds)
            for watched in list(self._watched.values()):
                self.check(watched)

    def check(self, watched: _Watched) -> None:
        """Check a call once, and call `on_stuck` or `on_lost` if necessary."""
        verdict = watched.steps.check(self._clock())
        if watched is not self._watched.get(watched.thread):
            return  # The call has ended.
        if verdict is Verdict.STUCK:
            watched.is_stuck = True
            reason = f"the stage has reported no step for {watched.steps.waited_seconds:.1f} s: its device is stuck"
            watched.context.run(_log.error, "call cancelled", reason=reason, at=_position_of(watched.thread))
            watched.on_stuck(reason)
        elif verdict is Verdict.LOST:
            watched.context.run(
                self._on_lost,
                f"the call has not ended {self._limits.exit_seconds:g} s after request {watched.request_id} "
                f"was cancelled; this process exits, to be restarted; at={_position_of(watched.thread)}",
            )


def _position_of(thread: int) -> str:
    """Return the innermost Python frame of a thread, as FILE:LINE:FUNCTION."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "unknown"
    last = traceback.extract_stack(frame)[-1]
    return f"{last.filename}:{last.lineno}:{last.name}"
