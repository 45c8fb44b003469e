"""Parity of all Wan 2.2 TI2V-5B stages with both of Diffusers' pipelines on the same directory.

The weights are random, but the scale factors are the published ones: 16x16 pixels and 4 frames per latent. A request
with an image is compared with WanImageToVideoPipeline, a request without an image with WanPipeline.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch import Tensor

from coarse_images import coarse_image, png
from local_fleet import NO_IMAGES, LocalFleet, open_fleet, reference_run, relative_error
from models.validation import InputValidationStage
from tiny_wan import build_tiny_wan_ti2v
from wan_pair import LATENTS_WITHIN, check, open_reference

SEED = 7
LONG = "old  stone &amp;amp; river\n" * 200

Request = dict[str, Any]

TEXT: dict[str, Request] = {
    "wide": {"num_frames": 9, "negative_prompt": "old stone"},
    "tall, without guidance": {"height": 96, "width": 64, "guidance_scale": 1.0, "negative_prompt": "is not read"},
    "square, 13 frames": {"width": 64, "num_frames": 13, "guidance_scale": 2.0},
    "one frame": {"num_frames": 1},
    "7 frames, rounded to 5": {"num_frames": 7},
    "cropped rows and columns": {"height": 80, "width": 112},
    "empty prompt": {"prompt": "", "num_frames": 9},
    "very long prompt": {"prompt": LONG, "negative_prompt": LONG[4:], "num_inference_steps": 2},
    "few tokens": {"prompt": LONG, "max_sequence_length": 12, "num_inference_steps": 2},
    "one step": {"num_inference_steps": 1},
    "many steps": {"num_inference_steps": 16},
    "two outputs": {"num_outputs_per_prompt": 2, "num_frames": 9},
}

IMAGE: dict[str, tuple[Request, tuple[int, int]]] = {
    "wide": ({"num_frames": 9, "negative_prompt": "old stone"}, (150, 90)),
    "tall, without guidance": ({"height": 96, "width": 64, "guidance_scale": 1.0}, (150, 90)),
    "another aspect ratio": ({"width": 64, "num_frames": 9}, (40, 300)),
    "the video's size": ({}, (96, 64)),
    "one frame": ({"num_frames": 1, "num_inference_steps": 2}, (150, 90)),
    "7 frames, rounded to 5": ({"num_frames": 7}, (64, 64)),
    "cropped rows and columns": ({"height": 80, "width": 112}, (150, 90)),
    "empty prompt": ({"prompt": "", "num_frames": 13}, (150, 90)),
    "very long prompt": ({"prompt": LONG, "num_inference_steps": 2}, (150, 90)),
    "many steps": ({"num_inference_steps": 16}, (150, 90)),
    "two outputs": ({"num_outputs_per_prompt": 2, "num_frames": 9}, (150, 90)),
}


@dataclass(frozen=True)
class Sides:
    """One checkpoint: `fleet` runs our services in this process, next to Diffusers' pipelines."""

    fleet: LocalFleet
    text: Any
    image: Any

    def ours(self, request: Request, image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run our services; returns "latents" and "pixels". An image selects the I2V variant."""
        images: Mapping[str, bytes] = NO_IMAGES if image is None else {"image": png(image)}
        return self.fleet.tensors(images=images, **given(**request))

    def theirs(self, request: Request, image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run the corresponding Diffusers pipeline; returns "latents" and "pixels"."""
        call = given(**request)
        call["num_videos_per_prompt"] = call.pop("num_outputs_per_prompt", 1)
        return reference_run(self.text, **call) if image is None else reference_run(self.image, image=image, **call)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    torch.set_num_threads(1)
    path = build_tiny_wan_ti2v(tmp_path_factory.mktemp("wan") / "ti2v")
    text, image = (open_reference(path, kind) for kind in (WanPipeline, WanImageToVideoPipeline))
    fleet = open_fleet(str(path))
    yield Sides(fleet, text, image)
    fleet.close()


def given(prompt: str = "a red apple on the moon", **others: Any) -> Request:
    """A small request."""
    size = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 5.0, "seed": SEED}
    return {"prompt": prompt, **size, **others}


@pytest.mark.parametrize("case", TEXT)
def test_text_to_video_matches_diffusers(sides: Sides, case: str) -> None:
    check(sides.ours(TEXT[case]), sides.theirs(TEXT[case]))


@pytest.mark.parametrize("case", IMAGE)
def test_image_to_video_matches_diffusers(sides: Sides, case: str) -> None:
    request, size = IMAGE[case]
    image = coarse_image(*size, seed=1)
    check(sides.ours(request, image), sides.theirs(request, image))


def test_an_image_is_rotated_by_its_exif_orientation(sides: Sides) -> None:
    image, file, exif = coarse_image(60, 200, seed=2), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    ours = sides.fleet.tensors(images={"image": file.getvalue()}, **given(num_inference_steps=1))
    check(ours, sides.theirs({"num_inference_steps": 1}, image))


def test_the_first_latent_frame_equals_the_image_latents(sides: Sides) -> None:
    """The result has the image's own latents, not the solver's output for this frame."""
    image = coarse_image(150, 90, seed=1)
    config = sides.image.vae.config
    pixels = sides.image.video_processor.preprocess(image, height=64, width=96)
    with torch.inference_mode():
        encoded = sides.image.vae.encode(pixels[:, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    for steps in (1, 4):
        latents = sides.ours({"num_inference_steps": steps, "num_outputs_per_prompt": 2}, image)["latents"]
        for each in range(2):
            assert relative_error(latents[each : each + 1, :, :1], (encoded - mean) / std) <= LATENTS_WITHIN
        assert not torch.equal(latents[0, :, 1:], latents[1, :, 1:])


def test_the_first_of_two_outputs_equals_a_single_output(sides: Sides) -> None:
    for image in (None, coarse_image(150, 90, seed=1)):
        alone, both = (sides.ours({"num_outputs_per_prompt": count}, image)["latents"] for count in (1, 2))
        assert relative_error(both[:1], alone) <= LATENTS_WITHIN
        assert relative_error(both[1:], alone) > 10 * LATENTS_WITHIN


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue car"},
        {"negative_prompt": "a blue car"},
        {"guidance_scale": 2.0},
        {"max_sequence_length": 2},
        {"seed": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
def test_every_input_changes_the_result(sides: Sides, has_image: bool, change: Request) -> None:
    """Negative control: each changed input moves the latents by more than 10 times the parity tolerance."""
    image = coarse_image(150, 90, seed=1) if has_image else None
    before, after = (sides.ours(request, image)["latents"] for request in ({}, change))
    assert relative_error(after, before) > 10 * LATENTS_WITHIN


def test_the_image_changes_the_frames_after_the_first_frame(sides: Sides) -> None:
    latents = [sides.ours({}, image)["latents"] for image in (None, *(coarse_image(64, 64, seed) for seed in (1, 2)))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert relative_error(latents[one][:, :, 1:], latents[other][:, :, 1:]) > 10 * LATENTS_WITHIN


@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
def test_rounded_frames_and_sizes_are_reported(sides: Sides, has_image: bool) -> None:
    """Height and width are rounded down to patches of 32 pixels, frames to 4n + 1."""
    request = given(height=80, width=112, num_frames=7, num_inference_steps=1)
    images = {"image": png(coarse_image(64, 64, seed=1))} if has_image else {}
    validated = InputValidationStage(sides.fleet.model).run(request, images)
    assert {warning.field for warning in validated.warnings} == {"num_frames", "height", "width"}
    assert sides.fleet.tensors(images=images, **request)["pixels"].shape == (1, 5, 3, 64, 96)
