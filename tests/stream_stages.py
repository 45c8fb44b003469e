"""Two small stages connected by a stream, with a stream as the result, for runner tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from async_tests import HANG_SECONDS
from common.artifacts import Canvas, LatentPart, Latents, MediaItem, Sampling, StepCheckpoint
from common.local import HostedStages
from common.stage import EMITTED, Call, PipelineStage, Stream

Hook = Callable[[int, Call], None]


def do_nothing(_: int, call: Call) -> None:
    """A hook that only checks for a cancellation."""
    call.check_cancelled()


@dataclass(frozen=True, kw_only=True)
class BlocksInput:
    """The first block, and the number of blocks."""

    initial_latents: Latents
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class BlocksOutput:
    """A stream of blocks."""

    denoised_blocks: Stream[Latents] = EMITTED


@dataclass(frozen=True, kw_only=True)
class FilesInput:
    """A stream of blocks as input."""

    denoised_blocks: Stream[Latents]
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class FilesOutput:
    """A stream of file parts, one per block."""

    media_items: Stream[MediaItem] = EMITTED


class BlockStage(PipelineStage[BlocksInput, BlocksOutput]):
    """Emits one block per step, latents + 0, latents + 1, ..., with a step checkpoint before each block."""

    def __init__(self, before_block: Hook = do_nothing) -> None:
        self._before_block = before_block

    def run(self, x: BlocksInput, call: Call) -> BlocksOutput:
        """Emit the blocks."""
        (part,) = x.initial_latents.parts.values()
        total = x.sampling.num_inference_steps
        for index in range(total):
            self._before_block(index, call)
            block = latents_of(part.latents + index)
            call.checkpoint(StepCheckpoint(step=index + 1, latents=block))
            call.emit("denoised_blocks", block, index)
            call.progress(index + 1, total)
        return BlocksOutput()


class FileStage(PipelineStage[FilesInput, FilesOutput]):
    """Emits bytes of the running sum over all blocks, so that each part depends on all previous blocks."""

    def __init__(self, before_item: Hook = do_nothing) -> None:
        self._before_item = before_item

    def run(self, x: FilesInput, call: Call) -> FilesOutput:
        """Emit a part for each block."""
        total = 0.0
        for index, block in enumerate(x.denoised_blocks):
            self._before_item(index, call)
            (part,) = block.parts.values()
            total += float(part.latents.double().sum())
            data = torch.tensor(list(f"{index} {total}\n".encode()), dtype=torch.uint8)
            call.emit("media_items", MediaItem(data=data, content_type="video/mp4", height=8, width=8), index)
            call.progress(index + 1, index + 1)
        return FilesOutput()


def latents_of(values: torch.Tensor) -> Latents:
    """Latents with one part."""
    return Latents(parts={"video": LatentPart(latents=values, raw_latent_shape=tuple(values.shape))})


def producer(before_block: Hook = do_nothing) -> HostedStages:
    """A denoising service with the stage that emits blocks."""
    return HostedStages("denoising", [BlockStage(before_block)])


def consumer(before_item: Hook = do_nothing) -> HostedStages:
    """A decoding service with the stage that reads blocks."""
    return HostedStages("decoding", [FileStage(before_item)])


def request(blocks: int = 5, count: int = 1 << 18) -> dict[str, Any]:
    """Inputs for `blocks` blocks of `count` float32 values."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(3))
    return {
        "initial_latents": latents_of(noise),
        "sampling": Sampling(num_inference_steps=blocks, seed=3),
        "canvas": Canvas(height=8, width=8),
    }


def text_of(items: tuple[MediaItem, ...]) -> bytes:
    """Concatenate the bytes of all parts."""
    return b"".join(item.data.numpy().tobytes() for item in items)


@dataclass
class Gate:
    """A hook that blocks at an index until it is opened."""

    index: int
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, index: int, call: Call) -> None:
        call.check_cancelled()
        if index == self.index:
            self.entered.set()
            assert self.opened.wait(HANG_SECONDS), "the gate was not opened"
