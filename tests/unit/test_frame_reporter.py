"""Reports of a running stage become frames. Only items above the byte limit block the stage."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from async_tests import HANG_SECONDS
from common.artifacts import LatentPart, Latents, StepCheckpoint
from common.errors import Cancelled
from common.rpc.frame_reporter import FrameReporter
from common.rpc.frames import CHUNK_BYTES, read_chunk
from common.stage import Call
from common.tensors import TorchTensors
from fleet.v1 import denoising_pb2

SIZE = 3 * CHUNK_BYTES


def step_checkpoint(step: int) -> StepCheckpoint:
    part = LatentPart(latents=torch.full((SIZE // 4,), step, dtype=torch.int32), raw_latent_shape=(SIZE // 4,))
    return StepCheckpoint(step=step, latents=Latents(parts={"video": part}))


def block(value: int) -> Latents:
    return step_checkpoint(value).latents


class BlockedTensors(TorchTensors):
    """Reads the tensors of a step checkpoint only after the stage has continued."""

    def __init__(self, continued: threading.Event) -> None:
        self._continued = continued

    def view(self, path: str, value: Any) -> Any:
        assert self._continued.wait(HANG_SECONDS), "the stage must not wait for the frames of its step checkpoint"
        return super().view(path, value)


def kinds(frames: list[bytes]) -> list[str]:
    """Kind of each frame, with slot and index of an item, or the step of a legacy checkpoint frame."""
    found = []
    for raw in frames:
        if read_chunk(raw) is not None:
            found.append("chunk")
            continue
        frame = denoising_pb2.DenoiseResponse.FromString(raw)
        match frame.WhichOneof("frame"):
            case "item":
                found.append(f"{frame.item.slot} {frame.item.index}")
            case "checkpoint":
                found.append(f"legacy checkpoint {frame.checkpoint.state.step}")
            case other:
                found.append(str(other))
    return found


def frames_of(stage: Callable[[Call], None], **more: Any) -> list[str]:
    """Kinds of the frames of a stage, read after the stage has ended."""

    async def main() -> list[bytes]:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TorchTensors(), **more)
        await asyncio.to_thread(stage, reporter.listen(Call("r")))
        reporter.end()
        return [frame async for frame in reporter.frames()]

    return kinds(asyncio.run(main()))


def test_the_newest_step_checkpoint_replaces_a_pending_step_checkpoint() -> None:
    """The newest step checkpoint takes the position of the pending one. No item precedes its step checkpoint."""

    def stage(call: Call) -> None:
        call.checkpoint(step_checkpoint(1))
        call.emit("denoised_blocks", block(1))
        call.checkpoint(step_checkpoint(2))
        call.emit("denoised_blocks", block(2))

    three = ["chunk"] * 3
    assert frames_of(stage) == ["checkpoint 1", *three, "denoised_blocks 0", *three, "denoised_blocks 1", *three]


def test_a_caller_without_item_support_gets_legacy_checkpoint_frames() -> None:
    def stage(call: Call) -> None:
        call.checkpoint(step_checkpoint(1))
        call.emit("denoised_blocks", block(1))

    assert frames_of(stage, sends_items=False) == ["legacy checkpoint 1", *["chunk"] * 3]


def test_a_stage_waits_for_a_slow_caller_at_the_byte_limit() -> None:
    """At most one item is pending besides the item being sent; the stage waits before the next item."""

    async def main() -> None:
        emitted: list[int] = []
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TorchTensors(), max_bytes=SIZE)
        call = reporter.listen(Call("r"))

        def stage() -> None:
            for number in range(5):
                call.emit("denoised_blocks", block(number))
                emitted.append(number)

        running = asyncio.create_task(asyncio.to_thread(stage))
        running.add_done_callback(lambda _: reporter.end())
        received = 0
        async for frame in reporter.frames():
            await asyncio.sleep(0.05)
            received += kinds([frame])[0].startswith("denoised_blocks")
            assert len(emitted) <= received + 1
        assert received == 5
        await running

    async def timed() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await main()

    asyncio.run(timed())


def test_a_cancelled_stage_does_not_wait_for_its_caller() -> None:
    async def main() -> None:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TorchTensors(), max_bytes=1)
        call = reporter.listen(Call("r"))

        def stage() -> None:
            call.emit("denoised_blocks", block(0))
            call.check_cancelled()

        running = asyncio.create_task(asyncio.to_thread(stage))
        await asyncio.sleep(0.1)
        assert not running.done(), "the item exceeds the byte limit"
        call.cancelled.set()
        with pytest.raises(Cancelled):
            await running

    async def timed() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await main()

    asyncio.run(timed())


def test_a_step_checkpoint_does_not_block_the_denoising_loop() -> None:
    async def main() -> list[bytes]:
        continued = threading.Event()
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, BlockedTensors(continued))
        call = reporter.listen(Call("r"))

        def stage() -> None:
            call.checkpoint(step_checkpoint(1))
            call.checkpoint(step_checkpoint(2))  # replaces the pending step checkpoint
            continued.set()
            call.progress(2, 2)

        await asyncio.to_thread(stage)
        reporter.end()
        return [frame async for frame in reporter.frames()]

    async def timed() -> list[bytes]:
        async with asyncio.timeout(HANG_SECONDS):
            return await main()

    assert kinds(asyncio.run(timed())) == ["checkpoint 1", "chunk", "chunk", "chunk", "progress"]
