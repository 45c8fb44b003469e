"""What a request costs each service, beside other requests of its model."""

from __future__ import annotations

from common.artifacts import ParamValue
from models.catalog import open_model
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


def test_videos_count_by_frames_too() -> None:
    short, long = (costs("emoji-video", num_frames=frames) for frames in (5, 9))
    assert long["denoising"] * 5 == short["denoising"] * 9
    assert long["decoding"] * 5 == short["decoding"] * 9
    assert long["text_encoding"] == short["text_encoding"] == 1
