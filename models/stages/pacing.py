"""Paces a denoising loop on an asynchronous device, which runs kernels long after they are enqueued.

If all steps were enqueued at once, the loop could not be cancelled and could not report progress. If the loop waited
for each step, the device would be idle while the next step is enqueued. Therefore, the next step is enqueued
LEAD_SECONDS before the expected end of the current step, estimated from the duration of the previous step. After a
cancellation the device finishes the current step, and one more step if the cancellation arrives within the last
LEAD_SECONDS of the current step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from common.stage import Call

LEAD_SECONDS = 0.05
"""Time before the expected end of a step at which the next step is enqueued. Enqueuing takes a few milliseconds."""
_POLL_SECONDS = 0.005


class DeviceEvent(Protocol):
    """A recorded event of a device, such as a torch.cuda.Event."""

    def query(self) -> bool:
        """Whether the device has finished all work before the event."""

    def synchronize(self) -> None:
        """Block until the device has finished all work before the event."""


def paced_steps(start: int, total: int, call: Call, device: torch.device) -> Iterator[int]:
    """Yield each step from `start` to `total` - 1 when it must be enqueued, and report finished steps.

    Raises the errors of call.check_cancelled(). On a CPU a step is finished when the caller requests the next step.
    """
    if device.type == "cuda":
        return event_paced_steps(start, total, call, lambda: _recorded(device))
    return _immediate_steps(start, total, call)


def _immediate_steps(start: int, total: int, call: Call) -> Iterator[int]:
    for step in range(start, total):
        call.check_cancelled()
        yield step
        call.progress(step + 1, total)


def _recorded(device: torch.device) -> DeviceEvent:
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def event_paced_steps(start: int, total: int, call: Call, record: Callable[[], DeviceEvent]) -> Iterator[int]:
    """Yield steps as paced_steps() does, for an asynchronous device.

    `record` records an event after the enqueued work. Waits for the first two steps, to measure the duration of a step,
    and for the last step.
    """
    unfinished: list[tuple[int, DeviceEvent]] = []
    ends: list[float] = []
    for step in range(start, total):
        call.check_cancelled()
        yield step
        unfinished.append((step + 1, record()))
        ahead = 1 if len(ends) >= 2 and step + 1 < total else 0
        while len(unfinished) > ahead:
            done, event = unfinished.pop(0)
            event.synchronize()
            ends.append(time.monotonic())
            call.progress(done, total)
        if ahead:
            _wait(unfinished[0][1], ends[-1] + (ends[-1] - ends[-2]) - LEAD_SECONDS, call)


def _wait(event: DeviceEvent, until: float, call: Call) -> None:
    """Wait until `until` (time.monotonic()), until the event is complete, or until the call is cancelled."""
    while (left := until - time.monotonic()) > 0 and not event.query():
        if call.cancelled.wait(min(left, _POLL_SECONDS)):
            return
