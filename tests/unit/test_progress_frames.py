"""Which steps a call reports: at most one per `step_seconds`, fewer to a slow reader, and always the last one."""

from __future__ import annotations

import asyncio

import pytest
import torch

from common.artifacts import DenoiseState, LatentPart, Latents
from common.rpc import reporter as module
from common.rpc.reporter import Reporter
from common.stage import Call
from common.tensors import TORCH
from fleet.v1 import denoising_pb2


def reported(total: int, *, step_seconds: float = 0.0, read_late: bool = True) -> list[int]:
    """The steps that arrive of a stage that makes `total` before anything is read."""

    async def main() -> list[int]:
        reporter = Reporter(denoising_pb2.DenoiseResponse, TORCH, step_seconds=step_seconds)
        call = reporter.listen(Call("r"))
        for step in range(1, total + 1):
            call.progress(step, total)
            await asyncio.sleep(0)  # The frame is queued by the event loop.
        reporter.end()
        frames = [denoising_pb2.DenoiseResponse.FromString(frame) async for frame in reporter.frames()]
        return [frame.progress.step for frame in frames]

    assert read_late
    return asyncio.run(main())


def test_steps_within_step_seconds_are_left_out_except_the_last() -> None:
    assert reported(8, step_seconds=3_600.0) == [1, 8]


def test_without_step_seconds_each_step_is_reported() -> None:
    assert reported(8) == list(range(1, 9))


def test_a_reader_that_is_slow_gets_fewer_steps_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_WAITING", 4)
    assert reported(100) == [1, 2, 3, 4, 100]


def test_a_checkpoint_is_sent_after_the_one_before_it() -> None:
    """The newest one is left out only for as long as an older one waits."""

    def state(step: int) -> DenoiseState:
        part = LatentPart(latents=torch.zeros(1), raw_latent_shape=(1,))
        return DenoiseState(step=step, latents=Latents(parts={"image": part}))

    async def main() -> list[int]:
        reporter = Reporter(denoising_pb2.DenoiseResponse, TORCH)
        call = reporter.listen(Call("r"))
        call.on_checkpoint(state(1))
        call.on_checkpoint(state(2))
        found: list[int] = []
        async for raw in reporter.frames():
            found.append(denoising_pb2.DenoiseResponse.FromString(raw).checkpoint.state.step)
            if found[-1] == 1:
                asyncio.get_running_loop().call_soon(call.on_checkpoint, state(3))
                asyncio.get_running_loop().call_later(0, asyncio.get_running_loop().call_soon, reporter.end)
        return found

    assert asyncio.run(main())[0] == 1
