"""A Call's own promises: a finished step is a point at which a cancelled or late stage ends."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from common.artifacts import Canvas, LatentPart, Latents
from common.errors import Cancelled, DeadlineExceeded, FleetError
from common.stage import Call
from models.stages.decoding import DecodingStage


def stopped(**more: Any) -> tuple[Call, list[int]]:
    """A call and the steps that it reported."""
    steps: list[int] = []
    return Call("r", on_progress=lambda step, _: steps.append(step), **more), steps


def cancelled() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@pytest.mark.parametrize(
    ("more", "error"),
    [({"cancelled": cancelled()}, Cancelled), ({"deadline": time.monotonic() - 1}, DeadlineExceeded)],
)
def test_a_finished_step_ends_a_call_and_is_not_reported(more: dict[str, Any], error: type[FleetError]) -> None:
    call, steps = stopped(**more)
    with pytest.raises(error, match="request r "):
        call.progress(1, 4)
    assert steps == []


def report_steps(call: Call, total: int) -> None:
    """A loop without a check of its own."""
    for step in range(1, total + 1):
        call.progress(step, total)


def test_a_stage_that_only_reports_steps_ends_within_one_of_its_cancel() -> None:
    """A plugin's stage may have no other check."""
    steps: list[int] = []
    event = threading.Event()

    def on_progress(step: int, _: int) -> None:
        steps.append(step)
        if step == 3:
            event.set()

    call = Call("r", on_progress=on_progress, cancelled=event)
    with pytest.raises(Cancelled):
        report_steps(call, 8)
    assert steps == [1, 2, 3]


class Frames:
    """A VAE of a video model that makes ten black frames, and counts them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.made = 0

    def decode(self, _: object) -> Any:
        """Yield frames; the caller cancels while the third one is decoded."""
        for _ in range(10):
            self.made += 1
            if self.made == 3:
                self.call.cancelled.set()
            yield torch.zeros(1, 3, 2, 2)


class Plain:
    """The callbacks that decoding needs of a pipeline config."""

    visual_part = "video"

    def unpack(self, part: str, latents: Any, _: object) -> Any:
        assert part == self.visual_part
        return latents

    def vae_latents(self, latents: Any) -> Any:
        return latents

    def num_frames(self, canvas: Canvas) -> int:
        return canvas.num_frames


def test_decoding_a_video_ends_within_a_frame_of_its_cancel() -> None:
    """The loop over frames has no other check than that of the finished frame."""
    call, steps = stopped()
    stage, vae = object.__new__(DecodingStage), Frames(call)
    stage._config, stage._vae = Plain(), vae  # type: ignore[assignment]
    stage._device, stage._dtype = torch.device("cpu"), torch.float32
    part = LatentPart(latents=torch.zeros(1, 1), raw_latent_shape=(1, 1))
    x = stage.Input(
        denoised_latents=Latents(parts={"video": part}),
        canvas=Canvas(height=2, width=2, num_frames=10, output_format="safetensors"),
    )
    with pytest.raises(Cancelled):
        list(stage._frames(part, 0, x, call))
    assert (vae.made, steps) == (3, [1, 2])
