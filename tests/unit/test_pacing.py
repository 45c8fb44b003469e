"""Pacing of a loop on a simulated asynchronous device: the queue stays short, the device stays busy."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from common.errors import Cancelled
from common.stage import Call
from models.stages import pacing
from models.stages.pacing import LEAD_SECONDS, event_paced_steps, paced_steps


@dataclass
class Clock:
    """Simulated time, which advances only during waits and while a step is enqueued."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Device:
    """Executes enqueued steps in order. `seconds` has the duration of each step, `ends` its end time."""

    clock: Clock
    seconds: list[float]
    ends: list[float] = field(default_factory=list)
    idle: float = 0.0

    def enqueue(self) -> None:
        """Enqueue the next step, which takes the host 3 ms."""
        self.clock.now += 0.003
        free = self.ends[-1] if self.ends else self.clock.now
        self.idle += max(0.0, self.clock.now - free)
        self.ends.append(max(free, self.clock.now) + self.seconds[len(self.ends)])

    def mark(self) -> Mark:
        return Mark(self.clock, self.ends[-1])


@dataclass
class Mark:
    clock: Clock
    end: float

    def query(self) -> bool:
        return self.clock.now >= self.end

    def synchronize(self) -> None:
        self.clock.now = max(self.clock.now, self.end)


class ClockedEvent(threading.Event):
    """An event whose wait() advances the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.now += timeout
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    return clock


def enqueue_all(steps: Iterator[int], device: Device) -> None:
    """Enqueue every step, as a denoising loop does."""
    for _ in steps:
        device.enqueue()


def run(clock: Clock, seconds: list[float]) -> tuple[Device, list[float], list[tuple[int, float]]]:
    """Run steps of these durations. Returns the device, the enqueue times, and the step and time of each report."""
    device, enqueued = Device(clock, seconds), []
    reported: list[tuple[int, float]] = []
    call = Call("r", on_progress=lambda step, _: reported.append((step, clock.now)), cancelled=ClockedEvent(clock))
    for _ in event_paced_steps(0, len(seconds), call, device.mark):
        enqueued.append(clock.now)
        device.enqueue()
    return device, enqueued, reported


@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.3, 20.0])
def test_the_device_stays_busy_and_steps_are_enqueued_at_most_lead_seconds_early(clock: Clock, seconds: float) -> None:
    device, enqueued, reported = run(clock, [seconds] * 12)
    # The loop waits for each of the first two steps, so the device is idle while the host enqueues the next step.
    assert device.idle <= 0.003 * 3
    for step in range(2, 12):
        assert device.ends[step - 1] - enqueued[step] <= min(LEAD_SECONDS, seconds) + 1e-6
    assert [step for step, _ in reported] == list(range(1, 13))
    assert all(when >= end for (_, when), end in zip(reported, device.ends, strict=True))


def test_pacing_adapts_to_shorter_steps(clock: Clock) -> None:
    device, _, _ = run(clock, [10.0] * 4 + [1.0] * 20)
    assert device.idle < 0.05


@pytest.mark.parametrize("moment", [5.0, 29.0, 33.3, 39.97, 39.999, 47.0])
def test_the_device_runs_at_most_one_step_and_lead_seconds_after_a_cancel(clock: Clock, moment: float) -> None:
    device, cancelled = Device(clock, [10.0] * 50), ClockedEvent(clock)
    reported: list[int] = []

    def monotonic() -> float:
        if clock.now >= moment:
            cancelled.set()
        return clock.now

    clock.monotonic = monotonic  # type: ignore[method-assign]
    call = Call("r", on_progress=lambda step, _: reported.append(step), cancelled=cancelled)
    steps = event_paced_steps(0, 50, call, device.mark)
    with pytest.raises(Cancelled):
        enqueue_all(steps, device)
    assert device.ends[-1] - moment <= 10.0 + 0.1
    assert len(reported) < 6


def test_a_resumed_loop_reports_its_own_steps(clock: Clock) -> None:
    device, reported = Device(clock, [1.0] * 9), []
    call = Call("r", on_progress=lambda step, total: reported.append((step, total)), cancelled=ClockedEvent(clock))
    enqueue_all(event_paced_steps(6, 9, call, device.mark), device)
    assert reported == [(7, 9), (8, 9), (9, 9)]


def test_a_step_on_a_cpu_is_reported_before_the_next_step_begins() -> None:
    seen: list[str] = []
    call = Call("r", on_progress=lambda step, _: seen.append(f"reported {step}"))
    for step in paced_steps(1, 4, call, torch.device("cpu")):
        seen.append(f"step {step}")
    assert seen == list(itertools.chain(*((f"step {step}", f"reported {step + 1}") for step in range(1, 4))))


def test_no_step_begins_on_a_cpu_after_a_cancel() -> None:
    call = Call("r")
    steps = paced_steps(0, 4, call, torch.device("cpu"))
    assert next(steps) == 0
    call.cancelled.set()
    with pytest.raises(Cancelled):
        next(steps)
