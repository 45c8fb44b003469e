"""When the running calls of a leaving worker are handed over, on a clock that jumps to the next timer."""

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
ROUNDING = 0.011
"""Seconds that a decision may come late: the shortest wait of the loop."""


class Jumping(selectors.DefaultSelector):
    """Waits for no file: time passes only here, and at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is scheduled, so that nothing would ever happen"
        self.now += timeout
        return super().select(0)


class Clock:
    """The time of a scene, in seconds since its start."""

    def __init__(self, selector: Jumping) -> None:
        self._selector = selector
        self._began = selector.now

    @property
    def now(self) -> float:
        return self._selector.now - self._began


class FakeCall:
    """A call whose steps take `step_seconds`. `asked_at` is when it was handed over."""

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
        assert self.asked_at is None, "it is handed over once"
        self.asked_at = self._clock.now


Scene = Callable[[Clock], Coroutine[Any, Any, None]]


def play(monkeypatch: pytest.MonkeyPatch, scene: Scene) -> None:
    """Run a scene in no time."""
    selector = Jumping()

    class Loop(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return selector.now

    monkeypatch.setattr(time, "monotonic", lambda: selector.now)
    with asyncio.Runner(loop_factory=lambda: Loop(selector)) as runner:
        runner.run(scene(Clock(selector)))


class FreeSlots:
    """Free slots on equal workers: those of the last time that has come."""

    def __init__(self, clock: Clock, slots: dict[float, int], *, answer_seconds: float = 0.0) -> None:
        self._clock = clock
        self._slots = slots
        self._answer_seconds = answer_seconds

    async def __call__(self) -> int:
        await asyncio.sleep(self._answer_seconds)
        return [slots for since, slots in sorted(self._slots.items()) if since <= self._clock.now][-1]


async def leave(calls: list[FakeCall], free_slots: Callable[[], Any], grace: float = GRACE) -> None:
    """Hand calls over until the grace period has ended."""
    running = asyncio.create_task(HandOver(lambda: calls, free_slots).run(grace))
    await asyncio.wait({running}, timeout=grace)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_call_goes_at_once_where_an_equal_worker_has_a_free_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(clock: Clock) -> None:
        call = FakeCall(clock)
        await leave([call], FreeSlots(clock, {0: 1}))
        assert call.asked_at == pytest.approx(0, abs=ROUNDING)

    play(monkeypatch, scene)


def test_a_slot_that_becomes_free_later_is_found_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(clock: Clock) -> None:
        call = FakeCall(clock)
        await leave([call], FreeSlots(clock, {0: 0, 7.5: 1}))
        assert call.asked_at == pytest.approx(8, abs=10 * ROUNDING)

    play(monkeypatch, scene)


@pytest.mark.parametrize(("grace", "margin"), [(30.0, 1.0), (4.0, 0.4)])
def test_without_a_free_slot_a_call_goes_a_step_before_the_grace_period_ends(
    monkeypatch: pytest.MonkeyPatch, grace: float, margin: float
) -> None:
    """Each call by its own steps: the step that runs, one that may be enqueued, and a margin have to fit."""

    async def scene(clock: Clock) -> None:
        calls = [FakeCall(clock, seconds) for seconds in (0.0, 0.25, 1.5)]
        await leave(calls, FreeSlots(clock, {0: 0}), grace)
        for call in calls:
            assert call.asked_at == pytest.approx(grace - margin - 2 * call.step_times.longest, abs=ROUNDING)

    play(monkeypatch, scene)


def test_as_many_calls_go_as_there_are_free_slots_and_those_that_wait_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(clock: Clock) -> None:
        runs, waits, last = FakeCall(clock), FakeCall(clock, has_begun=False), FakeCall(clock)
        calls = [runs, waits, last]
        leaving = asyncio.create_task(leave(calls, FreeSlots(clock, {0: 1, 5.5: 2})))
        await asyncio.sleep(4.5)
        asked = [[runs.is_asked, waits.is_asked, last.is_asked]]
        calls.remove(waits)  # It has a slot elsewhere, and does not count any more.
        for seconds in (1.0, 1.5):
            await asyncio.sleep(seconds)
            asked.append([runs.is_asked, waits.is_asked, last.is_asked])
        # The only free slot is for the call that is on its way, until that call has left.
        assert asked == [[False, True, False], [True, True, False], [True, True, True]]
        await leaving

    play(monkeypatch, scene)


def test_a_store_that_is_away_or_slow_delays_no_hand_over_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> int:
        raise Unavailable("the request store is away")

    async def scene(clock: Clock) -> None:
        for free_slots in (away, FreeSlots(clock, {0: 1}, answer_seconds=100.0)):
            began, call = clock.now, FakeCall(clock, 1.0)
            await leave([call], free_slots)
            assert call.asked_at == pytest.approx(began + GRACE - 1.0 - 2 * 1.0, abs=ROUNDING)

    play(monkeypatch, scene)


def test_a_call_that_comes_to_run_while_the_worker_leaves_is_handed_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had been accepted before, and was still being received."""

    async def scene(clock: Clock) -> None:
        calls: list[FakeCall] = []
        leaving = asyncio.create_task(leave(calls, FreeSlots(clock, {0: 1})))
        await asyncio.sleep(3.0)
        calls.append(FakeCall(clock))
        await asyncio.sleep(1.5)
        assert calls[0].is_asked
        await leaving

    play(monkeypatch, scene)


def test_the_longest_of_the_newest_four_steps_counts() -> None:
    times = StepTimes()
    assert times.longest == 0
    times.begin(0.0)
    assert times.longest == 0
    for now in (9.0, 10.0, 13.0, 15.0):
        times.step(now)
    assert times.longest == 9
    times.step(16.0)
    assert times.longest == 3, "the first step, which may load kernels, is old"
