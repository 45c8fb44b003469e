"""`Call.progress()` is a cancellation point: it raises after cancellation and after the deadline."""

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


def recorded_call(**more: Any) -> tuple[Call, list[int]]:
    """A call and the list of its reported steps."""
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
def test_progress_after_cancellation_or_deadline_raises_and_reports_nothing(
    more: dict[str, Any], error: type[FleetError]
) -> None:
    call, steps = recorded_call(**more)
    with pytest.raises(error, match="request r "):
        call.progress(1, 4)
    assert steps == []


def report_steps(call: Call, total: int) -> None:
    """Report steps without any other cancellation check."""
    for step in range(1, total + 1):
        call.progress(step, total)


def test_a_stage_that_only_reports_steps_ends_within_one_step_of_cancellation() -> None:
    """Stages of plugins may have no other cancellation check."""
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


class FakeVae:
    """VAE of a video model: decodes ten gray frames and counts them in `num_decoded`."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.num_decoded = 0

    def decode(self, _: object) -> Any:
        """Yield frames; the caller cancels while the third frame is decoded."""
        for _ in range(10):
            self.num_decoded += 1
            if self.num_decoded == 3:
                self.call.cancelled.set()
            yield torch.zeros(1, 3, 2, 2)


class FakeConfig:
    """The members of a pipeline config that DecodingStage._frames() uses."""

    visual_part = "video"

    def unpack(self, part: str, latents: Any, _: object) -> Any:
        assert part == self.visual_part
        return latents

    def vae_latents(self, latents: Any) -> Any:
        return latents

    def num_frames(self, canvas: Canvas) -> int:
        return canvas.num_frames


def test_video_decoding_ends_within_one_frame_of_cancellation() -> None:
    """The loop over frames checks for cancellation only in `Call.progress()`."""
    call, steps = recorded_call()
    stage, vae = object.__new__(DecodingStage), FakeVae(call)
    stage._config, stage._vae = FakeConfig(), vae  # type: ignore[assignment]
    stage._device, stage._dtype = torch.device("cpu"), torch.float32
    part = LatentPart(latents=torch.zeros(1, 1), raw_latent_shape=(1, 1))
    x = stage.Input(
        denoised_latents=Latents(parts={"video": part}),
        canvas=Canvas(height=2, width=2, num_frames=10, output_format="safetensors"),
    )
    with pytest.raises(Cancelled):
        list(stage._frames(part, 0, x, call))
    assert (vae.num_decoded, steps) == (3, [1, 2])
