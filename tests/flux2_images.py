"""Requests with reference images for the FLUX.2 pipelines, and checks that every pipeline must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from common.image_header import MAX_IMAGES
from local_fleet import LocalFleet, RecordedCall, call_of, reference_run, relative_error

# (width, height) in pixels, with different aspect ratios. In each size, a value is not a multiple of 16.
SIZES = ((100, 70), (64, 130), (95, 81))

BASE: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 2}

IMAGE_MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "one image, which determines the size": (1, BASE),
    "two images, explicit height": (2, {**BASE, "height": 32, "guidance_scale": 2.0}),
    "three images, two outputs": (
        3,
        {**BASE, "height": 48, "width": 32, "num_outputs_per_prompt": 2, "guidance_scale": 1.0},
    ),
    "two images, sigmas, few tokens, no prompt": (
        2,
        {"prompt": "", "width": 32, "sigmas": (1.0, 0.7, 0.3), "num_inference_steps": 9, "max_sequence_length": 32},
    ),
}


def given_images(count: int) -> list[Image.Image]:
    """Images of different sizes and contents."""
    return [coarse_image(*SIZES[index], seed=index + 1) for index in range(count)]


def files(images: Sequence[Image.Image]) -> dict[str, bytes]:
    """PNG files by role."""
    return {f"image_{index}" if index else "image": png(image) for index, image in enumerate(images)}


def check(pair: tuple[LocalFleet, Any], given: Mapping[str, Any], images: Sequence[Image.Image] = ()) -> None:
    """Compare latents, pixels and result size with Diffusers; asserts that the pixels vary."""
    fleet, pipeline = pair
    references = {"image": list(images)} if images else {}
    theirs = reference_run(pipeline, seed=5, **references, **call_of({**given}))
    ours = fleet.tensors(images=files(images), seed=5, **given)
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


def check_every_image_matters(fleet: LocalFleet) -> None:
    """Check that each image, and the order of images, changes the result far beyond the tolerance."""

    def latents(images: Sequence[Image.Image]) -> Tensor:
        return fleet.tensors(images=files(images), **BASE, height=48, width=48, seed=5)["latents"]

    one, two = given_images(2)
    before = latents([one, two])
    backwards = dict(reversed(files([one, two]).items()))
    same = fleet.tensors(images=backwards, **BASE, height=48, width=48, seed=5)["latents"]
    assert torch.equal(same, before), "the numbers in the role names order images, not the order of the mapping"
    for after in (latents([one]), latents([two, one]), latents([one, coarse_image(64, 130, seed=7)]), latents([])):
        assert relative_error(after, before) > 1e-3


def check_bad_images(fleet: LocalFleet) -> None:
    """Check that unsupported images and wrong numbers of images raise InvalidInput with role and rule."""
    good = png(coarse_image(64, 64))
    cases: list[tuple[dict[str, bytes], str, str]] = [
        ({"image_1": good}, "images", "takes: text"),
        ({"image": good, f"image_{MAX_IMAGES}": good}, f"image_{MAX_IMAGES}", "takes: text"),
        ({"image": good, "last_image": good}, "last_image", "takes: text"),
        (
            {"image": good, "image_1": png(coarse_image(63, 64))},
            "image_1",
            "63 x 64 is not at least 64 pixels",
        ),
        ({"image": png(coarse_image(64, 513))}, "image", "64 x 513 has an aspect ratio that is not at most 8"),
        ({"image": png(Image.new("RGB", (9000, 8000)))}, "image", "9000 x 8000 is not at most"),
        ({"image": good, "image_1": b"no image"}, "image_1", "is not a PNG, JPEG or WebP image"),
    ]
    for images, field, message in cases:
        recorded = RecordedCall()
        with pytest.raises(InvalidInput) as caught:
            fleet.media(recorded, images, **BASE, seed=1)
        assert caught.value.field == field
        assert message in caught.value.message
        assert not recorded.progress, "no stage may start"
