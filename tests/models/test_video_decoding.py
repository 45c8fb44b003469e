"""Stages that decode videos in parts: emitted items, their timing, and byte-equal replays."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from async_tests import HANG_SECONDS
from common.artifacts import Canvas, LatentPart, Latents, MediaItem
from common.errors import Cancelled, InternalError, InvalidInput
from common.stage import EMITTED, Call
from configs.pipeline_configs.wan import WanPipelineConfig
from local_fleet import joined
from models.catalog import open_model
from models.contracts import BLOCK_DECODING, VIDEO_DECODING
from models.media import Mp4Fragment
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.video_decoding import FRAGMENT_LATENT_FRAMES, BlockDecodingStage, VideoDecodingStage
from models.vaes.wan import load_wan_vae
from tiny_wan import build_tiny_wan

CANVAS = Canvas(height=32, width=48, num_frames=21, frame_rate=12.0, output_format="mp4")
LATENT_FRAMES, OUTPUTS = 6, 2
CPU = torch.device("cpu")


@dataclass
class Stages:
    """Both decoding stages with one VAE."""

    video: VideoDecodingStage
    block: BlockDecodingStage


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    torch.set_num_threads(1)
    checkpoint = open_model(str(build_tiny_wan(tmp_path_factory.mktemp("wan") / "t2v")), load_registry()).checkpoint
    config = WanPipelineConfig.from_checkpoint(checkpoint)
    modules = {"vae": load_wan_vae(checkpoint, "vae", CPU, torch.float32)}
    given = (config, Runtime(device=CPU, dtype=torch.float32), modules)
    return Stages(VideoDecodingStage(*given), BlockDecodingStage(*given))


@pytest.fixture(scope="module")
def latents() -> Tensor:
    shape = (OUTPUTS, 16, LATENT_FRAMES, CANVAS.height // 8, CANVAS.width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def artifact(latents: Tensor) -> Latents:
    return Latents(parts={"video": LatentPart(latents=latents, raw_latent_shape=tuple(latents.shape))})


@dataclass
class Blocks:
    """A stream of blocks.

    With `is_ahead`, all blocks have arrived; otherwise `on_wait` is called before each block.
    """

    blocks: Sequence[Latents]
    is_ahead: bool = False
    on_wait: Callable[[int], None] = lambda _: None
    num_yielded: int = 0

    def __iter__(self) -> Iterator[Latents]:
        for index, block in enumerate(self.blocks):
            if not self.is_ahead:
                self.on_wait(index)
            self.num_yielded = index + 1
            yield block

    def has_next(self) -> bool:
        return self.is_ahead and self.num_yielded < len(self.blocks)


def blocks_of(latents: Tensor, sizes: Sequence[int], **more: Any) -> Blocks:
    return Blocks([artifact(block) for block in torch.split(latents, list(sizes), dim=2)], **more)


@dataclass
class Emitted:
    """Items and progress that a stage reported."""

    items: list[MediaItem] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    def call(self) -> Call:
        def on_item(slot: str, index: int, item: MediaItem) -> None:
            assert (slot, index) == ("media_items", len(self.items))
            self.items.append(item)

        return Call("test", on_item=on_item, on_progress=lambda *step: self.progress.append(step))

    @property
    def summaries(self) -> list[tuple[int, int, int]]:
        """(file index, file count, frame count) of each item."""
        return [(item.file_index, item.file_count, item.num_frames) for item in self.items]

    @property
    def data(self) -> list[bytes]:
        return [item.data.numpy().tobytes() for item in self.items]


def decode(stages: Stages, latents: Tensor, canvas: Canvas = CANVAS) -> Emitted:
    emitted = Emitted()
    output = stages.video.run(stages.video.Input(denoised_latents=artifact(latents), canvas=canvas), emitted.call())
    assert output.media_items is EMITTED
    return emitted


def decode_blocks(stages: Stages, blocks: Blocks, canvas: Canvas = CANVAS, emitted: Emitted | None = None) -> Emitted:
    emitted = emitted or Emitted()
    output = stages.block.run(stages.block.Input(denoised_blocks=blocks, canvas=canvas), emitted.call())
    assert output.media_items is EMITTED
    return emitted


def decode_mp4(item: MediaItem) -> Tensor:
    """Decode an MP4 file; returns frames (frames, 3, height, width) in [0, 1]."""
    with av.open(io.BytesIO(item.data.numpy().tobytes()), mode="r") as container:
        assert container.streams.video[0].average_rate == CANVAS.frame_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.stack([torch.from_numpy(frame).permute(2, 0, 1).double() / 255 for frame in frames])


def test_media_items_and_denoised_blocks_are_streams_of_the_contracts() -> None:
    assert (VideoDecodingStage.contract, BlockDecodingStage.contract) == (VIDEO_DECODING, BLOCK_DECODING)
    assert VIDEO_DECODING.output_streams == BLOCK_DECODING.output_streams == {"media_items"}
    assert not VIDEO_DECODING.input_streams
    assert BLOCK_DECODING.input_streams == {"denoised_blocks"}


def test_a_video_is_emitted_in_fragments_of_a_few_latent_frames(stages: Stages, latents: Tensor) -> None:
    emitted = decode(stages, latents)
    first = 4 * FRAGMENT_LATENT_FRAMES - 3
    assert emitted.summaries == [(0, 2, first), (0, 2, 21 - first), (1, 2, first), (1, 2, 21 - first)]
    assert emitted.progress == [(step, 42) for step in range(1, 43)]
    pixels = load(decode(stages, latents, replace(CANVAS, output_format="safetensors")).data[0])["pixels"]
    for item, expected in zip(joined(emitted.items).items, pixels, strict=True):
        assert (item.content_type, item.num_frames, item.height, item.width) == ("video/mp4", 21, 32, 48)
        assert decode_mp4(item).shape == expected.shape
        # 4:2:0 subsampling blurs the colors of random latents, so the test compares brightness.
        assert float((decode_mp4(item).mean(1) - expected.mean(1)).abs().mean()) < 0.06


def test_a_block_becomes_one_fragment_per_output(stages: Stages, latents: Tensor) -> None:
    emitted = decode_blocks(stages, blocks_of(latents, (1, 3, 2)))
    assert emitted.summaries == [(0, 2, 1), (1, 2, 1), (0, 2, 12), (1, 2, 12), (0, 2, 8), (1, 2, 8)]
    assert emitted.progress == [(step, 42) for step in range(1, 43)]
    assert [decode_mp4(item).shape for item in joined(emitted.items).items] == [(21, 3, 32, 48)] * 2


def test_items_have_the_same_bytes_on_every_replay(stages: Stages, latents: Tensor) -> None:
    """Bytes do not depend on the time at which blocks arrive."""
    one = decode_blocks(stages, blocks_of(latents, (3, 3)))
    other = decode_blocks(stages, blocks_of(latents, (3, 3), is_ahead=True))
    assert (one.data, one.summaries) == (other.data, other.summaries)
    assert decode(stages, latents).data == decode(stages, latents).data


def test_blocks_of_the_size_of_fragments_give_the_same_files(stages: Stages, latents: Tensor) -> None:
    blocks = decode_blocks(stages, blocks_of(latents, (FRAGMENT_LATENT_FRAMES, LATENT_FRAMES - FRAGMENT_LATENT_FRAMES)))
    for one, other in zip(joined(blocks.items).items, joined(decode(stages, latents).items).items, strict=True):
        assert torch.equal(one.data, other.data)


def test_tensors_are_emitted_as_one_item_after_the_last_block(stages: Stages, latents: Tensor) -> None:
    canvas = replace(CANVAS, output_format="safetensors")
    whole, blocks = decode(stages, latents, canvas), decode_blocks(stages, blocks_of(latents, (1, 2, 3)), canvas)
    assert whole.summaries == blocks.summaries == [(0, 1, 21)]
    assert whole.progress == blocks.progress == [(step, 42) for step in range(1, 43)]
    tensors = [load(each.data[0]) for each in (whole, blocks)]
    assert whole.items[0].content_type == "application/vnd.safetensors"
    assert tensors[0]["pixels"].shape == (2, 21, 3, 32, 48)
    assert torch.equal(tensors[0]["latents"], latents)
    for name in ("latents", "pixels"):
        assert torch.equal(tensors[0][name], tensors[1][name])


def test_the_items_of_a_block_are_emitted_before_the_next_block_arrives(stages: Stages, latents: Tensor) -> None:
    emitted, counts = Emitted(), []
    blocks = blocks_of(latents, (2, 2, 2), on_wait=lambda _: counts.append(len(emitted.items)))
    decode_blocks(stages, blocks, emitted=emitted)
    assert counts == [0, 2, 4]


def test_a_fragment_is_encoded_while_the_next_frames_are_decoded(
    stages: Stages, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder of the first fragment waits for a decoded frame of the second block, without a deadlock."""
    decoded = threading.Event()
    finish = Mp4Fragment.finish

    def finish_late(fragment: Mp4Fragment) -> bytes:
        assert decoded.wait(HANG_SECONDS), "no frame of the second block was decoded while the first fragment waited"
        return finish(fragment)

    def on_progress(step: int, _: int) -> None:
        if step == 10:
            decoded.set()

    monkeypatch.setattr(Mp4Fragment, "finish", finish_late)
    emitted = Emitted()
    call = replace(emitted.call(), on_progress=on_progress)
    blocks = blocks_of(latents[:1], (3, 3), is_ahead=True)
    stages.block.run(stages.block.Input(denoised_blocks=blocks, canvas=CANVAS), call)
    assert emitted.summaries == [(0, 1, 9), (0, 1, 12)]


def test_decoding_ends_within_a_frame_when_cancelled(stages: Stages, latents: Tensor) -> None:
    recorded: list[int] = []
    cancelled = threading.Event()

    def on_progress(step: int, _: int) -> None:
        recorded.append(step)
        if step % 3 == 0:
            cancelled.set()

    call = Call("test", on_progress=on_progress, cancelled=cancelled)
    with pytest.raises(Cancelled):
        stages.video.run(stages.video.Input(denoised_latents=artifact(latents), canvas=CANVAS), call)
    cancelled.clear()
    with pytest.raises(Cancelled):
        stages.block.run(stages.block.Input(denoised_blocks=blocks_of(latents, (3, 3)), canvas=CANVAS), call)
    assert recorded == [1, 2, 3] * 2


def test_an_encoder_error_is_raised(stages: Stages, latents: Tensor) -> None:
    """libx264 refuses odd sizes, which request validation excludes."""
    given = stages.video.Input(denoised_latents=artifact(latents), canvas=replace(CANVAS, width=47))
    with pytest.raises(av.error.FFmpegError, match="libx264"):
        stages.video.run(given, Call("test"))


@pytest.mark.parametrize("output_format", ["png", "gif"])
def test_unsupported_output_formats_are_refused(stages: Stages, latents: Tensor, output_format: str) -> None:
    canvas = replace(CANVAS, output_format=output_format)
    message = f"output_format: {output_format!r} is not supported by this model; mp4 and safetensors work"
    with pytest.raises(InvalidInput, match=message):
        decode(stages, latents, canvas)
    with pytest.raises(InvalidInput, match=message):
        decode_blocks(stages, blocks_of(latents, (3, 3)), canvas)


@pytest.mark.parametrize("output_format", ["mp4", "safetensors"])
def test_missing_blocks_raise_an_internal_error(stages: Stages, latents: Tensor, output_format: str) -> None:
    canvas = replace(CANVAS, output_format=output_format)
    with pytest.raises(InternalError, match="26 decoded frames are not the 42 frames of the request"):
        decode_blocks(stages, blocks_of(latents[:, :, :4], (2, 2)), canvas)
    with pytest.raises(InternalError, match="0 decoded frames are not the 21 frames of the request"):
        decode_blocks(stages, Blocks([]), canvas)
