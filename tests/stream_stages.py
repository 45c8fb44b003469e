"""Two small stages with a stream between them, and a stream as the result: for tests of runners."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from common.artifacts import Canvas, LatentPart, Latents, MediaItem, Sampling, StepCheckpoint
from common.local import HostedStages
from common.stage import EMITTED, Call, PipelineStage, Stream

Hook = Callable[[int, Call], None]


def do_nothing(_: int, call: Call) -> None:
    """The hook of a stage that only computes."""
    call.check_cancelled()


@dataclass(frozen=True, kw_only=True)
class BlocksInput:
    """The first block, and how many there are."""

    initial_latents: Latents
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class BlocksOutput:
    """The blocks."""

    denoised_blocks: Stream[Latents] = EMITTED


@dataclass(frozen=True, kw_only=True)
class FilesInput:
    """Blocks as they come."""

    denoised_blocks: Stream[Latents]
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class FilesOutput:
    """A part of a file for each block."""

    media_items: Stream[MediaItem] = EMITTED


class BlockStage(PipelineStage[BlocksInput, BlocksOutput]):
    """Emits the latents plus 0, 1, ...: as many blocks as there are steps, a step checkpoint before each."""

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
    """Makes bytes of a running sum over all blocks so far, so that each part depends on those before."""

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
    """The stage that emits blocks, as a denoising service."""
    return HostedStages("denoising", [BlockStage(before_block)])


def consumer(before_item: Hook = do_nothing) -> HostedStages:
    """The stage that reads them, as a decoding service."""
    return HostedStages("decoding", [FileStage(before_item)])


def request(blocks: int = 5, count: int = 1 << 18) -> dict[str, Any]:
    """Inputs for so many blocks of `count` float32 numbers."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(3))
    return {
        "initial_latents": latents_of(noise),
        "sampling": Sampling(num_inference_steps=blocks, seed=3),
        "canvas": Canvas(height=8, width=8),
    }


def text_of(items: tuple[MediaItem, ...]) -> bytes:
    """The bytes of all parts together."""
    return b"".join(item.data.numpy().tobytes() for item in items)


@dataclass
class Gate:
    """A hook that stops at an index until it is opened."""

    index: int
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, index: int, call: Call) -> None:
        call.check_cancelled()
        if index == self.index:
            self.entered.set()
            assert self.opened.wait(30), "nobody opened the gate"
