"""A loop on an asynchronous device, simulated on a clock of its own: it neither runs away nor lets the device idle."""

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
    """Time that passes only when somebody waits, or enqueues."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class Device:
    """Computes steps one after the other, each of the seconds that it takes, from when they were enqueued."""

    clock: Clock
    seconds: list[float]
    ends: list[float] = field(default_factory=list)
    idle: float = 0.0

    def enqueue(self) -> None:
        """The next step; telling it to the device takes the host 3 ms."""
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


class Waited(threading.Event):
    """An event on whose time the clock moves."""

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
    """What a denoising loop comes to."""
    for _ in steps:
        device.enqueue()


def run(clock: Clock, seconds: list[float]) -> tuple[Device, list[float], list[tuple[int, float]]]:
    """Run steps that take so long; returns the device, when each was enqueued, and when each was told as done."""
    device, enqueued = Device(clock, seconds), []
    reported: list[tuple[int, float]] = []
    call = Call("r", on_progress=lambda step, _: reported.append((step, clock.now)), cancelled=Waited(clock))
    for _ in event_paced_steps(0, len(seconds), call, device.mark):
        enqueued.append(clock.now)
        device.enqueue()
    return device, enqueued, reported


@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.3, 20.0])
def test_a_device_never_waits_and_never_has_more_than_a_step_before_it(clock: Clock, seconds: float) -> None:
    device, enqueued, reported = run(clock, [seconds] * 12)
    assert device.idle <= 0.003 * 3  # the first two steps are waited for, and the first enqueueing finds it idle
    for step in range(2, 12):
        assert device.ends[step - 1] - enqueued[step] <= min(LEAD_SECONDS, seconds) + 1e-6
    assert [step for step, _ in reported] == list(range(1, 13))
    assert all(when >= end for (_, when), end in zip(reported, device.ends, strict=True))


def test_steps_that_become_shorter_are_noticed(clock: Clock) -> None:
    device, _, _ = run(clock, [10.0] * 4 + [1.0] * 20)
    assert device.idle < 0.05


@pytest.mark.parametrize("moment", [5.0, 29.0, 33.3, 39.97, 39.999, 47.0])
def test_a_cancel_leaves_the_device_a_step_and_the_lead(clock: Clock, moment: float) -> None:
    device, cancelled = Device(clock, [10.0] * 50), Waited(clock)
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


def test_a_resumed_loop_reports_the_steps_that_it_has(clock: Clock) -> None:
    device, reported = Device(clock, [1.0] * 9), []
    call = Call("r", on_progress=lambda step, total: reported.append((step, total)), cancelled=Waited(clock))
    enqueue_all(event_paced_steps(6, 9, call, device.mark), device)
    assert reported == [(7, 9), (8, 9), (9, 9)]


def test_on_a_cpu_a_step_is_finished_when_the_next_begins() -> None:
    seen: list[str] = []
    call = Call("r", on_progress=lambda step, _: seen.append(f"told {step}"))
    for step in paced_steps(1, 4, call, torch.device("cpu")):
        seen.append(f"step {step}")
    assert seen == list(itertools.chain(*((f"step {step}", f"told {step + 1}") for step in range(1, 4))))


def test_on_a_cpu_no_step_begins_after_a_cancel() -> None:
    call = Call("r")
    steps = paced_steps(0, 4, call, torch.device("cpu"))
    assert next(steps) == 0
    call.cancelled.set()
    with pytest.raises(Cancelled):
        next(steps)
