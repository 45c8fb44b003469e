"""Times of hand-overs from a leaving worker, on a clock that jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from common.errors import Unavailable
from common.rpc.hand_over import HandOver, StepTimes

GRACE = 30.0
"""Grace period in seconds."""
ROUNDING = 0.011
"""Tolerance of times in seconds, slightly more than the shortest wait of HandOver.run()."""


class JumpingSelector(selectors.DefaultSelector):
    """A selector that advances its clock by the timeout and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "the loop has no timer and would wait forever"
        self.now += timeout
        return super().select(0)


class Clock:
    """The time in seconds since the start of a scenario."""

    def __init__(self, selector: JumpingSelector) -> None:
        self._selector = selector
        self._began = selector.now

    @property
    def now(self) -> float:
        return self._selector.now - self._began


class FakeCall:
    """A call whose longest step took `step_seconds`. `asked_at` is the time of `hand_over()`."""

    def __init__(self, clock: Clock, step_seconds: float = 0.0, *, has_begun: bool = True) -> None:
        self.request_id = "r"
        self.has_begun = has_begun
        self.step_times = StepTimes()
        self.step_times.begin(0.0)
        self.step_times.step(step_seconds)
        self.asked_at: float | None = None
        self._clock = clock

    @property
    def is_asked(self) -> bool:
        return self.asked_at is not None

    def hand_over(self) -> None:
        assert self.asked_at is None, "hand_over() must be called once"
        self.asked_at = self._clock.now


Scenario = Callable[[Clock], Coroutine[Any, Any, None]]


def run_scenario(monkeypatch: pytest.MonkeyPatch, scenario: Scenario) -> None:
    """Run a scenario on the jumping clock."""
    selector = JumpingSelector()

    class Loop(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return selector.now

    monkeypatch.setattr(time, "monotonic", lambda: selector.now)
    with asyncio.Runner(loop_factory=lambda: Loop(selector)) as runner:
        runner.run(scenario(Clock(selector)))


class FreeSlots:
    """Number of free worker slots of other workers. `slots` maps a time in seconds to the number from then on."""

    def __init__(self, clock: Clock, slots: dict[float, int], *, answer_seconds: float = 0.0) -> None:
        self._clock = clock
        self._slots = slots
        self._answer_seconds = answer_seconds

    async def __call__(self) -> int:
        await asyncio.sleep(self._answer_seconds)
        return [slots for since, slots in sorted(self._slots.items()) if since <= self._clock.now][-1]


async def leave(calls: list[FakeCall], free_slots: Callable[[], Any], grace: float = GRACE) -> None:
    """Run HandOver until the end of the grace period."""
    running = asyncio.create_task(HandOver(lambda: calls, free_slots).run(grace))
    await asyncio.wait({running}, timeout=grace)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_call_is_handed_over_at_once_if_a_worker_slot_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(clock: Clock) -> None:
        call = FakeCall(clock)
        await leave([call], FreeSlots(clock, {0: 1}))
        assert call.asked_at == pytest.approx(0, abs=ROUNDING)

    run_scenario(monkeypatch, scenario)


def test_a_worker_slot_that_becomes_free_later_is_used_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(clock: Clock) -> None:
        call = FakeCall(clock)
        await leave([call], FreeSlots(clock, {0: 0, 7.5: 1}))
        assert call.asked_at == pytest.approx(8, abs=10 * ROUNDING)

    run_scenario(monkeypatch, scenario)


@pytest.mark.parametrize(("grace", "margin"), [(30.0, 1.0), (4.0, 0.4)])
def test_a_call_is_handed_over_before_the_grace_period_ends_if_no_worker_slot_is_free(
    monkeypatch: pytest.MonkeyPatch, grace: float, margin: float
) -> None:
    """The remaining time suffices for the running step, one step that may be enqueued, and a margin."""

    async def scenario(clock: Clock) -> None:
        calls = [FakeCall(clock, seconds) for seconds in (0.0, 0.25, 1.5)]
        await leave(calls, FreeSlots(clock, {0: 0}), grace)
        for call in calls:
            assert call.asked_at == pytest.approx(grace - margin - 2 * call.step_times.longest, abs=ROUNDING)

    run_scenario(monkeypatch, scenario)


def test_free_worker_slots_bound_the_hand_overs_and_waiting_calls_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(clock: Clock) -> None:
        runs, waits, last = FakeCall(clock), FakeCall(clock, has_begun=False), FakeCall(clock)
        calls = [runs, waits, last]
        leaving = asyncio.create_task(leave(calls, FreeSlots(clock, {0: 1, 5.5: 2})))
        await asyncio.sleep(4.5)
        handed_over = [[runs.is_asked, waits.is_asked, last.is_asked]]
        calls.remove(waits)  # Another worker runs the call.
        for seconds in (1.0, 1.5):
            await asyncio.sleep(seconds)
            handed_over.append([runs.is_asked, waits.is_asked, last.is_asked])
        # The only free worker slot is reserved for the waiting call until that call has been handed over.
        assert handed_over == [[False, True, False], [True, True, False], [True, True, True]]
        await leaving

    run_scenario(monkeypatch, scenario)


def test_an_unavailable_or_slow_store_does_not_delay_the_last_hand_overs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable() -> int:
        raise Unavailable("the request store is unavailable")

    async def scenario(clock: Clock) -> None:
        for free_slots in (unavailable, FreeSlots(clock, {0: 1}, answer_seconds=100.0)):
            began, call = clock.now, FakeCall(clock, 1.0)
            await leave([call], free_slots)
            assert call.asked_at == pytest.approx(began + GRACE - 1.0 - 2 * 1.0, abs=ROUNDING)

    run_scenario(monkeypatch, scenario)


def test_a_call_that_starts_while_the_worker_leaves_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker accepted the call before it began to leave, and was still receiving inputs of the call."""

    async def scenario(clock: Clock) -> None:
        calls: list[FakeCall] = []
        leaving = asyncio.create_task(leave(calls, FreeSlots(clock, {0: 1})))
        await asyncio.sleep(3.0)
        calls.append(FakeCall(clock))
        await asyncio.sleep(1.5)
        assert calls[0].is_asked
        await leaving

    run_scenario(monkeypatch, scenario)


def test_longest_is_the_duration_of_the_longest_of_the_newest_four_steps() -> None:
    times = StepTimes()
    assert times.longest == 0
    times.begin(0.0)
    assert times.longest == 0
    for now in (9.0, 10.0, 13.0, 15.0):
        times.step(now)
    assert times.longest == 9
    times.step(16.0)
    assert times.longest == 3, "the first step, which may load kernels, must no longer count"
