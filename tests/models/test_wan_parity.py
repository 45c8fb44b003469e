"""Parity of all Wan 2.1 stages with Diffusers' pipelines: same weights, seed and arguments."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from local_fleet import RecordedCall, reference_run, relative_error
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v
from wan_pair import LATENTS_WITHIN, Pair, check, open_pair

SEED = 7


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = open_pair(build_tiny_wan(tmp_path_factory.mktemp("wan") / "t2v"), WanPipeline)
    yield pair
    pair[0].close()


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = open_pair(build_tiny_wan_i2v(tmp_path_factory.mktemp("wan") / "i2v"), WanImageToVideoPipeline)
    yield pair
    pair[0].close()


@pytest.fixture(scope="module")
def flf2v(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_wan_i2v(tmp_path_factory.mktemp("wan") / "flf2v", last_image=True)
    pair = open_pair(path, WanImageToVideoPipeline)
    yield pair
    pair[0].close()


def given(prompt: str = "a red apple on the moon", **others: Any) -> dict[str, Any]:
    """A small request."""
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 5.0}
    return {"prompt": prompt, **size, **others}


@pytest.mark.parametrize(
    "request_",
    [
        given(height=32, width=48, num_frames=9, negative_prompt="old stone"),
        given(height=48, width=32, guidance_scale=1.0, negative_prompt="is not read"),
        given("", num_inference_steps=1),
        given("a cat", num_frames=1, num_inference_steps=2),
        given("old  stone &amp;amp; river\n" * 200, num_inference_steps=2),
        given("the moon", max_sequence_length=12, num_inference_steps=2),
        given("a car", num_inference_steps=16, guidance_scale=2.0),
    ],
    ids=["wide", "tall-unguided", "empty", "one-frame", "long", "few-tokens", "many-steps"],
)
def test_text_to_video_matches_diffusers(t2v: Pair, request_: dict[str, Any]) -> None:
    fleet, pipeline = t2v
    check(fleet.tensors(seed=SEED, **request_), reference_run(pipeline, seed=SEED, **request_))


def test_two_outputs_match_diffusers_and_differ(t2v: Pair) -> None:
    fleet, pipeline = t2v
    ours = fleet.tensors(seed=SEED, num_outputs_per_prompt=2, **given())
    check(ours, reference_run(pipeline, seed=SEED, num_videos_per_prompt=2, **given()))
    assert not torch.equal(ours["latents"][0], ours["latents"][1])


@pytest.mark.parametrize(("num_frames", "rounded"), [(6, 5), (7, 5), (8, 9), (2, 1)])
def test_frames_are_rounded_as_in_diffusers(t2v: Pair, num_frames: int, rounded: int) -> None:
    fleet, pipeline = t2v
    request = given(num_frames=num_frames, num_inference_steps=1)
    ours = fleet.tensors(seed=SEED, **request)
    assert ours["pixels"].shape[1] == rounded
    check(ours, reference_run(pipeline, seed=SEED, **request))


def test_the_prompt_changes_the_video(t2v: Pair) -> None:
    fleet, _ = t2v
    one, other = (fleet.tensors(seed=SEED, **given(prompt))["latents"] for prompt in ("a red car", "a blue car"))
    assert relative_error(other, one) > 10 * LATENTS_WITHIN


def test_a_long_prompt_is_truncated_with_a_warning(t2v: Pair) -> None:
    recorded = RecordedCall()
    t2v[0].tensors(recorded, seed=SEED, **given("cat " * 30 + "moon", max_sequence_length=8, num_inference_steps=1))
    ((field, message),) = recorded.warnings
    assert field == "prompt"
    assert "truncated to 8" in message
    assert message.endswith("moon")


@pytest.mark.parametrize(
    "request_",
    [
        given(height=32, width=48, num_frames=9, negative_prompt="old stone"),
        given("", height=48, width=32, guidance_scale=1.0),
        given("cat " * 600, num_frames=1, num_inference_steps=2),
    ],
    ids=["wide", "tall-empty-unguided", "one-frame-long"],
)
def test_image_to_video_matches_diffusers(i2v: Pair, request_: dict[str, Any]) -> None:
    fleet, pipeline = i2v
    image = coarse_image(150, 90, seed=1)
    theirs = reference_run(pipeline, seed=SEED, image=image, **request_)
    check(fleet.tensors(images={"image": png(image)}, seed=SEED, **request_), theirs)


def test_an_image_is_rotated_by_its_exif_orientation(i2v: Pair) -> None:
    fleet, pipeline = i2v
    image = coarse_image(60, 200, seed=2)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    request = given(num_inference_steps=1)
    theirs = reference_run(pipeline, seed=SEED, image=image, **request)
    check(fleet.tensors(images={"image": file.getvalue()}, seed=SEED, **request), theirs)


def test_the_image_changes_the_video(i2v: Pair) -> None:
    fleet, _ = i2v
    one, other = (
        fleet.tensors(images={"image": png(coarse_image(64, 64, seed))}, seed=SEED, **given())["latents"]
        for seed in (1, 2)
    )
    assert relative_error(other, one) > 10 * LATENTS_WITHIN


def test_the_first_of_two_videos_of_one_image_equals_a_single_video(i2v: Pair) -> None:
    """Diffusers raises an error for several videos of one image."""
    fleet, _ = i2v
    images = {"image": png(coarse_image(64, 64, seed=1))}
    both = fleet.tensors(images=images, seed=SEED, num_outputs_per_prompt=2, **given())["latents"]
    alone = fleet.tensors(images=images, seed=SEED, **given())["latents"]
    assert relative_error(both[:1], alone) <= LATENTS_WITHIN
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("request_", [given(width=48, num_frames=9), given("", guidance_scale=1.0)])
def test_first_and_last_frame_to_video_matches_diffusers(flf2v: Pair, request_: dict[str, Any]) -> None:
    fleet, pipeline = flf2v
    first, last = coarse_image(150, 90, seed=1), coarse_image(64, 200, seed=2)
    theirs = reference_run(pipeline, seed=SEED, image=first, last_image=last, **request_)
    images = {"last_image": png(last), "image": png(first)}
    check(fleet.tensors(images=images, seed=SEED, **request_), theirs)


@pytest.mark.parametrize(
    ("roles", "field"), [((), "image"), (("image",), "last_image"), (("image", "last_image", "image_1"), "image_1")]
)
def test_unsupported_image_roles_are_refused(flf2v: Pair, roles: tuple[str, ...], field: str) -> None:
    images = {role: png(coarse_image(8, 8, seed=0)) for role in roles}
    with pytest.raises(InvalidInput) as caught:
        flf2v[0].tensors(images=images, seed=SEED, **given())
    assert caught.value.field == field
    assert "WanImageToVideoPipeline" in caught.value.message


def test_one_frame_with_a_first_and_a_last_image_is_refused(flf2v: Pair) -> None:
    images = {role: png(coarse_image(8, 8, seed=0)) for role in ("image", "last_image")}
    with pytest.raises(InvalidInput) as caught:
        flf2v[0].tensors(images=images, seed=SEED, **given(num_frames=1))
    assert caught.value.field == "num_frames"
