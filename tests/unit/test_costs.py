"""What a request costs each service, beside other requests of its model."""

from __future__ import annotations

import pytest

from common.artifacts import ParamValue
from common.pipeline import ComposedPipeline, Cost
from models.catalog import open_model
from models.pipelines.qwen_image_edit import QwenImageEditPipeline
from models.pipelines.wan_image_to_video import WanImageToVideoPipeline
from models.registry import load_registry
from models.validation import InputValidationStage
from services.coordinator.costs import costs_of


def costs(name: str, **given: ParamValue) -> dict[str, int]:
    model = open_model(name, load_registry())
    validated = InputValidationStage(model).run({"prompt": "a red apple", **given})
    return costs_of(validated.variant.services, validated.params)


def test_pictures_count_by_pixels_outputs_and_steps() -> None:
    given = {"height": 64, "width": 128, "num_inference_steps": 7, "num_outputs_per_prompt": 3}
    pixels = 64 * 128 * 3
    assert costs("emoji", **given) == {
        "text_encoding": 1,
        "latent_preparation": pixels,
        "denoising": pixels * 7,
        "decoding": pixels,
    }


@pytest.mark.parametrize("pipeline", [QwenImageEditPipeline, WanImageToVideoPipeline])
def test_encoded_images_count_by_pixels(pipeline: type[ComposedPipeline]) -> None:
    services = pipeline(pipeline._required_config_modules).services
    assert {spec.service: spec.cost for spec in services} == {
        "text_encoding": Cost.REQUEST,
        "image_encoding": Cost.PIXEL,
        "latent_preparation": Cost.PIXEL,
        "denoising": Cost.PIXEL_STEP,
        "decoding": Cost.PIXEL,
    }
    assert [spec.service for spec in services if spec.reports_steps] == ["denoising"]
    assert [spec.resume_slot for spec in services if spec.service == "denoising"] == ["resume_from"]


def test_videos_count_by_frames_too() -> None:
    short, long = (costs("emoji-video", num_frames=frames) for frames in (5, 9))
    assert long["denoising"] * 5 == short["denoising"] * 9
    assert long["decoding"] * 5 == short["decoding"] * 9
    assert long["text_encoding"] == short["text_encoding"] == 1
