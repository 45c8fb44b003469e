"""Parity of all Qwen-Image-Edit-Plus stages with Diffusers' pipeline: same weights, seed and images.

Input images have about 4000 tokens each; the tests reduce this in both implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as reference
from PIL import Image
from torch import Tensor

from coarse_images import coarse_image, png
from common.artifacts import StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, InvalidInput
from common.image_header import MAX_IMAGES
from common.stage import Call
from common.tensors import TORCH
from configs.models.vaes.qwen_image import image_size_of_area
from configs.pipeline_configs.qwen_image_edit_plus import QwenImageEditPlusPipelineConfig, plus_template
from local_fleet import LocalFleet, RecordedCall, call_of, open_fleet, reference_run, relative_error
from models.contracts import DenoisingInput
from models.loader import load_stages
from models.runtime import Runtime
from models.validation import InputValidationStage
from step_checkpoints import step_checkpoints_to
from tiny_qwen_image import build_tiny_qwen_image_edit_plus, open_edit_plus_reference, qwen_tokenizer

AREA = 160 * 160
BASE: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_inference_steps": 2}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car"}
LONG = "the old stone river on the moon and the red cat in a blue car " * 20
SIZES = ((90, 60), (50, 200), (64, 64))
Pair = tuple[LocalFleet, Any]


def input_images(count: int) -> list[Image.Image]:
    return [coarse_image(*SIZES[index % len(SIZES)], seed=index + 1) for index in range(count)]


def files(images: list[Image.Image]) -> dict[str, bytes]:
    return {f"image_{index}" if index else "image": png(image) for index, image in enumerate(images)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Pair]]:
    """Fleet and Diffusers' pipeline by zero_cond_t: True as in release 2511, False as in release 2509."""
    torch.set_num_threads(1)
    opened: dict[bool, Pair] = {}
    for zero_cond_t in (True, False):
        path = build_tiny_qwen_image_edit_plus(tmp_path_factory.mktemp("qwen") / "plus", zero_cond_t=zero_cond_t)
        theirs = open_edit_plus_reference(path)
        theirs.set_progress_bar_config(disable=True)
        opened[zero_cond_t] = open_fleet(str(path)), theirs
    yield opened
    for fleet, _ in opened.values():
        fleet.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode input images at fewer pixels in both implementations."""
    monkeypatch.setattr(QwenImageEditPlusPipelineConfig, "vae_image_area", AREA)
    monkeypatch.setattr(reference, "VAE_IMAGE_SIZE", AREA)


def check(pair: Pair, images: list[Image.Image], request: Mapping[str, Any]) -> None:
    fleet, pipeline = pair
    theirs = reference_run(pipeline, seed=5, image=images, **call_of({**request}))
    ours = fleet.tensors(images=files(images), seed=5, **request)
    for name in ("latents", "pixels"):
        assert ours[name].shape == theirs[name].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "one image, guided": (True, 1, GUIDED),
    "three images, long prompt": (True, 3, {"height": 80, "width": 32, "prompt": LONG}),
    "two images, two outputs, empty prompt, sigmas": (
        True,
        2,
        {"num_outputs_per_prompt": 2, "prompt": "", "sigmas": (1.0, 0.6, 0.3), "num_inference_steps": 3},
    ),
    "2509, two images, guided, two outputs": (False, 2, {**GUIDED, "num_outputs_per_prompt": 2}),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", CASES)
def test_latents_and_pixels_match_diffusers(pairs: dict[bool, Pair], case: str) -> None:
    zero_cond_t, count, change = CASES[case]
    check(pairs[zero_cond_t], input_images(count), BASE | change)


def test_areas_of_encoded_images_equal_diffusers() -> None:
    assert QwenImageEditPlusPipelineConfig.vae_image_area == reference.VAE_IMAGE_SIZE
    assert QwenImageEditPlusPipelineConfig.encoder_image_area == reference.CONDITION_IMAGE_SIZE


@pytest.mark.usefixtures("small")
def test_every_input_and_the_order_of_images_change_the_result(pairs: dict[bool, Pair]) -> None:
    """Negative control: each change moves the latents by more than 10 times the parity tolerance."""

    def latents(images: list[Image.Image], zero_cond_t: bool = True, **change: Any) -> Tensor:
        return pairs[zero_cond_t][0].tensors(images=files(images), seed=5, **BASE | GUIDED | change)["latents"]

    one, two = input_images(2)
    before = latents([one, two])
    for after in (
        latents([one]),
        latents([two, one]),
        latents([one, coarse_image(50, 200, seed=7)]),
        latents([one, two], prompt="a blue apple"),
        latents([one, two], negative_prompt="a red car"),
        latents([one, two], zero_cond_t=False),
    ):
        assert relative_error(after, before) > 1e-3


def loop_input(fleet: LocalFleet) -> DenoisingInput:
    """The loop's input for a request with two images."""
    images = files(input_images(2))
    validated = InputValidationStage(fleet.model).run({**BASE, **GUIDED, "num_inference_steps": 3, "seed": 3}, images)
    values: dict[str, Any] = dict(validated.artifacts)
    for service in fleet.model.services:
        if service.service == "denoising":
            return DenoisingInput(**{name: values[name] for name in service.contract.inputs if name in values})
        hosted = fleet.services[service.service].of("")
        values |= hosted.run({name: values[name] for name in service.contract.inputs if name in values}, Call("test"))
    raise AssertionError("the pipeline has no denoising service")


@pytest.mark.usefixtures("small")
def test_a_loop_resumes_after_every_step_and_ends_within_a_step_when_cancelled(pairs: dict[bool, Pair]) -> None:
    fleet = pairs[True][0]
    x = loop_input(fleet)
    assert x.image_latents is not None
    assert x.image_latents.parts.keys() == {"condition", "condition_1"}
    (stage,) = load_stages(fleet.model, fleet.model.service("denoising"), Runtime(step_checkpoint_every=1))
    states: list[StepCheckpoint] = []
    call = Call("test", on_item=step_checkpoints_to(states.append))
    whole = stage.run(x, call).denoised_latents.parts["image"].latents
    assert [state.step for state in states] == [1, 2]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        resumed = stage.run(DenoisingInput(**vars(x) | {"resume_from": sent}), Call("test"))
        assert torch.equal(resumed.denoised_latents.parts["image"].latents, whole)
    steps: list[int] = []

    def on_progress(step: int, _: int) -> None:
        steps.append(step)
        cancelled.cancelled.set()

    cancelled = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        stage.run(x, cancelled)
    assert steps == [1]


def test_the_default_size_has_the_aspect_ratio_of_the_last_image(pairs: dict[bool, Pair]) -> None:
    stage = InputValidationStage(pairs[True][0].model)
    images = files(input_images(2))
    params = stage.run({"prompt": ""}, {role: images[role] for role in reversed(images)}).params
    assert (params.height, params.width) == image_size_of_area(200, 50)


def test_the_skipped_tokens_are_those_before_the_first_image() -> None:
    template = plus_template(2)
    head, *_ = template.before.partition("Picture 1:")
    assert len(qwen_tokenizer()(head).input_ids) == template.skipped
    assert template.before.count("<|image_pad|>") == 2
    assert "<|vision_end|>Picture 2: <|vision_start|>" in template.before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "images", "field"),
    [
        ({}, {}, "image"),
        ({}, {"image_1": png(coarse_image(9, 9))}, "image"),
        ({}, {"image": png(coarse_image(9, 9)), "image_1": b"no image"}, "image_1"),
        ({}, {"image": png(coarse_image(9, 9)), f"image_{MAX_IMAGES}": png(coarse_image(9, 9))}, f"image_{MAX_IMAGES}"),
        ({}, {"image": png(Image.new("RGB", (9000, 8000)))}, "image"),
        ({"num_inference_steps": 1}, files(input_images(1)), "num_inference_steps"),
        ({"height": 8}, files(input_images(1)), "height"),
        ({"prompt": "put <|image_pad|> there"}, files(input_images(2)), "prompt"),
    ],
    ids=[
        "no image",
        "no first image",
        "not an image file",
        "too many images",
        "large image",
        "one step",
        "small height",
        "image token in the prompt",
    ],
)
def test_unsupported_edits_are_refused(
    pairs: dict[bool, Pair], change: dict[str, Any], images: dict[str, bytes], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        pairs[True][0].media(RecordedCall(), images, **BASE | change, seed=1)
    assert caught.value.field == field


@pytest.mark.parametrize("flag", ["use_additional_t_cond", "use_layer3d_rope"])
def test_the_transformer_of_another_pipeline_is_refused(tmp_path: Path, pairs: dict[bool, Pair], flag: str) -> None:
    path = tmp_path / "other"
    path.mkdir()
    for each in pairs[True][0].model.checkpoint.path.iterdir():
        (path / each.name).symlink_to(each)
    (path / "transformer").unlink()
    (path / "transformer").mkdir()
    for each in (pairs[True][0].model.checkpoint.path / "transformer").iterdir():
        (path / "transformer" / each.name).symlink_to(each)
    config = path / "transformer" / "config.json"
    text = config.read_text().replace(f'"{flag}": false', f'"{flag}": true')
    config.unlink()
    config.write_text(text)
    with pytest.raises(CheckpointError, match=f"{flag}: True is not False"):
        open_fleet(str(path))
