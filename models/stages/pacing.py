"""Paces a denoising loop by its device, which on CUDA computes long after kernels are enqueued.

A loop that enqueued all steps at once could neither be cancelled nor report its progress. A loop that waited for each
step would leave the device idle while it enqueues the next one. This loop enqueues the next step LEAD_SECONDS before
the expected end of the current one, which it estimates from the duration of the previous step. After a cancel the
device finishes the current step, and one more if the cancel comes within the last LEAD_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from common.stage import Call

LEAD_SECONDS = 0.05
"""How long before the end of a step the next one is enqueued; that takes a few milliseconds."""
_LOOK_SECONDS = 0.005


class Mark(Protocol):
    """A place in what a device was given to do, as a recorded torch.cuda.Event is."""

    def query(self) -> bool:
        """Whether the device has come there."""

    def synchronize(self) -> None:
        """Wait until it has."""


def paced_steps(start: int, total: int, call: Call, device: torch.device) -> Iterator[int]:
    """The steps from `start` to below `total`, each when it is due to be enqueued; reports finished steps to the call.

    Raises as call.check_cancelled. On a CPU a step is finished as soon as the loop asks for the next one.
    """
    if device.type == "cuda":
        return marked_steps(start, total, call, lambda: _recorded(device))
    return _immediate_steps(start, total, call)


def _immediate_steps(start: int, total: int, call: Call) -> Iterator[int]:
    for step in range(start, total):
        call.check_cancelled()
        yield step
        call.progress(step + 1, total)


def _recorded(device: torch.device) -> Mark:
    event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def marked_steps(start: int, total: int, call: Call, record: Callable[[], Mark]) -> Iterator[int]:
    """The same for a device that is asynchronous; `record` marks the end of what it was given so far.

    The first two steps are waited for, which tells the time that one takes, and the last, so that it is finished.
    """
    unfinished: list[tuple[int, Mark]] = []
    ends: list[float] = []
    for step in range(start, total):
        call.check_cancelled()
        yield step
        unfinished.append((step + 1, record()))
        ahead = 1 if len(ends) >= 2 and step + 1 < total else 0
        while len(unfinished) > ahead:
            done, mark = unfinished.pop(0)
            mark.synchronize()
            ends.append(time.monotonic())
            call.progress(done, total)
        if ahead:
            _wait(unfinished[0][1], ends[-1] + (ends[-1] - ends[-2]) - LEAD_SECONDS, call)


def _wait(mark: Mark, until: float, call: Call) -> None:
    """Wait until that time of the monotonic clock, or until the device is there, or the call is cancelled."""
    while (left := until - time.monotonic()) > 0 and not mark.query():
        if call.cancelled.wait(min(left, _LOOK_SECONDS)):
            return
