"""The emoji video model shows the prompted object with the prompted motion.

The object is separated from the background by color: pixels that differ from the median color of the frame's border
belong to the emoji. The motion is its center of mass and its area over time. The measure is not learned; for noise, the
center does not move and the area does not pulse.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from numpy.typing import NDArray

from local_fleet import LocalFleet, open_fleet, reference_run

MODEL = "emoji-video"
FRAMES, SIDE = 17, 64
MIN_DIFFERENCE = 0.15
"""Smallest difference from the background color, in [0, 1], of a pixel that belongs to the object."""

Video = NDArray[np.float64]
"""Frames (F, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Track:
    """Per frame: center of mass as fractions of width and height, and area as a fraction of the frame."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    area: NDArray[np.float64]


def track(video: Video) -> Track:
    """Track the pixels that are not background."""
    border = np.concatenate([video[:, :, 0], video[:, :, -1], video[..., 0], video[..., -1]], axis=-1)
    background = np.median(border, axis=-1)[..., None, None]
    mass = np.abs(video - background).max(axis=1)
    mass[mass < MIN_DIFFERENCE] = 0
    rows, columns = np.mgrid[: mass.shape[1], : mass.shape[2]] + 0.5
    total = mass.sum(axis=(1, 2)) + 1e-9
    x, y = ((mass * axis).sum(axis=(1, 2)) / total / SIDE for axis in (columns, rows))
    return Track(x, y, (mass > 0).mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def fleet() -> Iterator[LocalFleet]:
    """The model's services in this process."""
    torch.set_num_threads(2)
    opened = open_fleet(MODEL)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def video_of(fleet: LocalFleet) -> Callable[[str], Video]:
    """Generate a video with the checkpoint's defaults; cached by prompt."""
    videos: dict[str, Video] = {}

    def generate(prompt: str) -> Video:
        if prompt not in videos:
            videos[prompt] = fleet.tensors(prompt=prompt, seed=0)["pixels"][0].double().numpy()
        return videos[prompt]

    return generate


@pytest.mark.parametrize(
    ("prompt", "axis", "direction"),
    [("a cat moving left", "x", -1), ("a red car moving right", "x", 1), ("an apple falling", "y", 1)],
)
def test_the_center_of_mass_moves_as_prompted(
    video_of: Callable[[str], Video], prompt: str, axis: str, direction: int
) -> None:
    measured = track(video_of(prompt))
    along, across = (measured.x, measured.y) if axis == "x" else (measured.y, measured.x)
    steps = direction * np.diff(along)
    assert (steps > 0).mean() >= 0.9, f"{axis} of the center: {along.round(2)}"
    assert direction * (along[-1] - along[0]) > 0.25
    assert np.ptp(across) < 0.1, "the object also moves along the other axis"


def test_the_area_of_a_beating_heart_pulses(video_of: Callable[[str], Video]) -> None:
    """A clip has two beats. The area is large at 1/4 of a beat and small at 3/4; the center is fixed."""
    measured = track(video_of("a red heart beating"))
    large, small = measured.area[[2, 10]], measured.area[[6, 14]]
    assert large.min() > 1.5 * small.max(), f"area: {measured.area.round(2)}"
    assert np.ptp(measured.x) < 0.05
    assert np.ptp(measured.y) < 0.05


def test_the_beating_heart_is_red_on_white(video_of: Callable[[str], Video]) -> None:
    video = video_of("a red heart beating")
    red, green, blue = video[:, :, SIDE // 2, SIDE // 2].mean(axis=0)
    assert red > 0.6
    assert max(green, blue) < 0.5
    assert video[:, :, :2].min() > 0.85, "the background is not white"


def test_noise_neither_moves_nor_pulses() -> None:
    """Negative control of the motion measure."""
    measured = track(np.random.default_rng(0).random((FRAMES, 3, SIDE, SIDE)))
    assert abs(measured.x[-1] - measured.x[0]) < 0.05
    assert measured.area[[2, 10]].min() < 1.5 * measured.area[[6, 14]].max()


def test_diffusers_generates_the_same_video_from_the_same_directory(
    fleet: LocalFleet, video_of: Callable[[str], Video]
) -> None:
    pipeline = WanPipeline.from_pretrained(fleet.model.checkpoint.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    given = {**fleet.model.checkpoint.sampling_defaults}
    del given["frame_rate"]
    theirs = reference_run(pipeline, prompt="a red heart beating", seed=0, **given)
    assert np.abs(theirs["pixels"][0].double().numpy() - video_of("a red heart beating")).max() < 1e-3


def test_the_mp4_has_the_same_frames_at_the_models_frame_rate(
    fleet: LocalFleet, video_of: Callable[[str], Video]
) -> None:
    (item,) = fleet.media(prompt="a red heart beating", seed=0).items
    assert (item.content_type, item.num_frames, item.height, item.width) == ("video/mp4", FRAMES, SIDE, SIDE)
    with av.open(io.BytesIO(item.data.numpy().tobytes()), "r") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert float(stream.average_rate or 0) == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    decoded = np.stack(frames).astype(np.float64).transpose(0, 3, 1, 2) / 255
    assert decoded.shape == video_of("a red heart beating").shape
    assert np.abs(decoded - video_of("a red heart beating")).mean() < 0.03
