"""Progress frames of a call: at most one step per `step_seconds`, and always the last step."""

from __future__ import annotations

import asyncio

import pytest

from common.rpc import frame_reporter as module
from common.rpc.frame_reporter import FrameReporter
from common.stage import Call
from common.tensors import TORCH
from fleet.v1 import denoising_pb2


def reported_steps(total: int, *, step_seconds: float = 0.0) -> list[int]:
    """Steps received from a stage that completes `total` steps before the reader starts to read."""

    async def main() -> list[int]:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TORCH, step_seconds=step_seconds)
        call = reporter.listen(Call("r"))
        for step in range(1, total + 1):
            call.progress(step, total)
            await asyncio.sleep(0)  # The frame is queued by the event loop.
        reporter.end()
        frames = [denoising_pb2.DenoiseResponse.FromString(frame) async for frame in reporter.frames()]
        return [frame.progress.step for frame in frames]

    return asyncio.run(main())


def test_steps_within_step_seconds_are_omitted_except_the_last_step() -> None:
    assert reported_steps(8, step_seconds=3_600.0) == [1, 8]


def test_without_step_seconds_each_step_is_reported() -> None:
    assert reported_steps(8) == list(range(1, 9))


def test_a_slow_reader_gets_fewer_steps_and_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 4)
    assert reported_steps(100) == [1, 2, 3, 4, 100]
