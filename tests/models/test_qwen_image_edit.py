"""Parity of all Qwen-Image-Edit stages with Diffusers' pipeline: same weights, seed and image.

The input image has about 4000 tokens at any output size, so the tests use few steps and few cases.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from coarse_images import coarse_image, png
from common.errors import CheckpointError, InvalidInput
from common.image_header import ImageHeader
from configs.models.vaes.qwen_image import image_size_of_area
from configs.pipeline_configs.qwen_image_edit import EDIT_TEMPLATE, MAX_POSITIONS, QwenImageEditPipelineConfig
from configs.sample.qwen_image import QwenImageEditSamplingParams
from local_fleet import LocalFleet, RecordedCall, open_fleet, reference_run, relative_error
from models.encoder_runners.image_text import ImageTextEncoder
from models.validation import InputValidationStage
from tiny_qwen_image import build_tiny_qwen_image_edit, open_edit_reference, qwen_tokenizer

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_inference_steps": 2}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car"}
LONG = "the old stone river on the moon and the red cat in a blue car " * 20


def xmp_rotated(data: bytes) -> bytes:
    """Add XMP metadata to a PNG, with the orientation of an image that is rotated by 90 degrees."""
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_qwen_image_edit(tmp_path_factory.mktemp("qwen") / "edit")
    theirs = open_edit_reference(path)
    theirs.set_progress_bar_config(disable=True)
    fleet = open_fleet(str(path))
    yield fleet, theirs
    fleet.close()


@pytest.mark.parametrize(
    ("size", "given"),
    [
        ((90, 60), GUIDED),
        ((50, 200), {"height": 80, "width": 32, "prompt": LONG}),
        ((64, 64), {"num_outputs_per_prompt": 2, "prompt": "", "sigmas": (1.0, 0.4)}),
    ],
    ids=["wide, guided", "tall, long prompt", "square, two outputs, empty prompt"],
)
def test_latents_and_pixels_match_diffusers(pair: Pair, size: tuple[int, int], given: dict[str, Any]) -> None:
    fleet, pipeline = pair
    request = BASE | given
    call = {name: value for name, value in request.items() if name != "num_outputs_per_prompt"}
    if "sigmas" in call:
        call["sigmas"] = list(call["sigmas"])
    outputs = request.get("num_outputs_per_prompt", 1)
    theirs = reference_run(pipeline, seed=5, image=coarse_image(*size), num_images_per_prompt=outputs, **call)
    ours = fleet.tensors(images={"image": png(coarse_image(*size))}, seed=5, **request)
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


def test_prompt_image_and_negative_prompt_change_the_result(pair: Pair) -> None:
    """Negative control: each changed input moves the latents by more than 10 times the parity tolerance."""

    def latents(image: Image.Image, **change: Any) -> torch.Tensor:
        return pair[0].tensors(images={"image": png(image)}, seed=5, **BASE | GUIDED | change)["latents"]

    before = latents(coarse_image(90, 60))
    for after in (
        latents(coarse_image(90, 60, seed=2)),
        latents(coarse_image(90, 60), prompt="a blue apple"),
        latents(coarse_image(90, 60), negative_prompt="a red car"),
    ):
        assert relative_error(after, before) > 1e-3


def test_the_skipped_tokens_are_those_before_the_first_image() -> None:
    head, _ = EDIT_TEMPLATE.before.split("<|vision_start|>")
    assert len(qwen_tokenizer()(head).input_ids) == EDIT_TEMPLATE.skipped


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(pair: Pair) -> None:
    encoding = QwenImageEditPipelineConfig.from_checkpoint(pair[0].model.checkpoint).image_text_encoding
    encoder = pair[1].text_encoder.model
    num_embeddings = encoder.get_input_embeddings().num_embeddings
    tokenizer = qwen_tokenizer()
    assert len(tokenizer) == num_embeddings
    tokenizer.add_tokens(["one more"])
    with pytest.raises(
        CheckpointError, match=f"tokenizer: {num_embeddings + 1} tokens are not at most {num_embeddings}"
    ):
        ImageTextEncoder(encoding, tokenizer, pair[1].processor.image_processor, encoder, torch.device("cpu"))


@pytest.mark.parametrize(
    "size", [(64, 64), (90, 60), (60, 90), (1, 60), (1999, 1201), (5000, 333), (31, 1023)], ids=str
)
def test_image_sizes_are_computed_as_in_diffusers(size: tuple[int, int]) -> None:
    width, height = size
    theirs = calculate_dimensions(1024 * 1024, width / height)
    assert image_size_of_area(height, width) == (theirs[1], theirs[0])


def test_the_default_size_has_the_aspect_ratio_of_the_image(pair: Pair) -> None:
    stage = InputValidationStage(pair[0].model)
    params = stage.run({"prompt": ""}, {"image": png(coarse_image(90, 60))}).params
    assert (params.height, params.width) == image_size_of_area(60, 90) == (832, 1248)
    params = stage.run({"prompt": "", "height": 64}, {"image": png(coarse_image(90, 60))}).params
    assert (params.height, params.width) == (64, 1248)
    headers = {"image": ImageHeader(format="PNG", height=90, width=60)}
    assert QwenImageEditSamplingParams.image_defaults(headers, {}) == {"height": 1248, "width": 832}


def test_the_default_size_follows_the_orientation_in_the_metadata(pair: Pair) -> None:
    sideways = xmp_rotated(png(coarse_image(90, 60)))
    params = InputValidationStage(pair[0].model).run({"prompt": ""}, {"image": sideways}).params
    assert (params.height, params.width) == image_size_of_area(90, 60)


def test_16_bit_gray_is_accepted_with_a_warning(pair: Pair) -> None:
    file = io.BytesIO()
    Image.new("I;16", (9, 9), 20_000).save(file, "PNG")
    request = InputValidationStage(pair[0].model).run({"prompt": ""}, {"image": file.getvalue()})
    assert [warning.field for warning in request.warnings] == ["image"]
    assert "above 255 become white" in request.warnings[0].message


def test_a_max_sequence_length_without_effect_is_reported(pair: Pair) -> None:
    stage = InputValidationStage(pair[0].model)
    warnings = stage.run({"prompt": "", "max_sequence_length": 8}, {"image": png(coarse_image(9, 9))}).warnings
    assert [warning.field for warning in warnings] == ["max_sequence_length"]


@pytest.mark.parametrize(
    ("given", "images", "field"),
    [
        ({}, {}, "image"),
        ({}, {"image": b"no image"}, "image"),
        ({}, {"image": png(coarse_image(9, 9)), "image_1": png(coarse_image(9, 9))}, "image_1"),
        ({"num_inference_steps": 1}, {"image": png(coarse_image(9, 9))}, "num_inference_steps"),
        ({"prompt": "put <|image_pad|> there"}, {"image": png(coarse_image(9, 9))}, "prompt"),
        ({"prompt": "猫" * MAX_POSITIONS}, {"image": png(coarse_image(9, 9))}, "prompt"),
        ({**GUIDED, "negative_prompt": "<|image_pad|>"}, {"image": png(coarse_image(9, 9))}, "negative_prompt"),
    ],
    ids=[
        "no image",
        "not an image file",
        "two images",
        "one step",
        "image token in the prompt",
        "long prompt",
        "image token in the negative prompt",
    ],
)
def test_unsupported_edits_are_refused(pair: Pair, given: dict[str, Any], images: dict[str, bytes], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pair[0].media(RecordedCall(), images, **BASE | given, seed=1)
    assert caught.value.field == field
