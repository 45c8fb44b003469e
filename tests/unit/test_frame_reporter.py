"""What a stage tells while it runs becomes frames without holding the stage up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import torch

from common.artifacts import LatentPart, Latents, StepCheckpoint
from common.rpc.frame_reporter import FrameReporter
from common.rpc.frames import CHUNK_BYTES, read_chunk
from common.stage import Call
from common.tensors import TorchTensors
from fleet.v1 import denoising_pb2

SIZE = 3 * CHUNK_BYTES


def state(step: int) -> StepCheckpoint:
    part = LatentPart(latents=torch.full((SIZE // 4,), step, dtype=torch.int32), raw_latent_shape=(SIZE // 4,))
    return StepCheckpoint(step=step, latents=Latents(parts={"video": part}))


class Withheld(TorchTensors):
    """Reads a checkpoint's tensors only once the stage has gone on."""

    def __init__(self, gone_on: threading.Event) -> None:
        self._gone_on = gone_on

    def view(self, path: str, value: Any) -> Any:
        assert self._gone_on.wait(20), "the stage waits for its checkpoint to be made into frames"
        return super().view(path, value)


def kinds(frames: list[bytes]) -> list[str]:
    """What each frame is: a chunk, or the other kind with its step."""
    found = []
    for raw in frames:
        if read_chunk(raw) is not None:
            found.append("chunk")
        else:
            frame = denoising_pb2.DenoiseResponse.FromString(raw)
            is_checkpoint = frame.HasField("checkpoint")
            found.append(f"checkpoint {frame.checkpoint.state.step}" if is_checkpoint else "progress")
    return found


def test_the_checkpoint_of_a_call_that_is_handed_over_is_sent_although_the_one_before_it_waits() -> None:
    async def main() -> list[bytes]:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TorchTensors())
        call = reporter.listen(Call("r"))

        def stage() -> None:
            call.checkpoint(state(1))
            call.hand_over.set()
            call.checkpoint(state(2))

        await asyncio.to_thread(stage)
        reporter.end()
        return [frame async for frame in reporter.frames()]

    assert kinds(asyncio.run(main())) == ["checkpoint 1", *["chunk"] * 3, "checkpoint 2", *["chunk"] * 3]


def test_a_checkpoint_does_not_hold_its_loop_up() -> None:
    async def main() -> list[bytes]:
        gone_on = threading.Event()
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, Withheld(gone_on))
        call = reporter.listen(Call("r"))

        def stage() -> None:
            call.checkpoint(state(1))
            call.checkpoint(state(2))  # left out: the one before it still waits
            gone_on.set()
            call.progress(2, 2)

        await asyncio.to_thread(stage)
        reporter.end()
        return [frame async for frame in reporter.frames()]

    async def timed() -> list[bytes]:
        async with asyncio.timeout(30):
            return await main()

    assert kinds(asyncio.run(timed())) == ["checkpoint 1", "chunk", "chunk", "chunk", "progress"]
