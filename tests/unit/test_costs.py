"""Cost of a request per service, relative to other requests of its model."""

from __future__ import annotations

from typing import Any, cast

import pytest

from common.artifacts import ParamValue
from common.pipeline import ComposedPipeline, Cost
from common.scaling import StageWork
from configs.pipeline_configs.base import NegativePromptConfig
from configs.pipeline_configs.packed import PackedPipelineConfig
from configs.pipeline_configs.wan import WanPipelineConfig
from configs.sample.base import SamplingParams
from configs.sample.flux import FluxSamplingParams
from configs.sample.wan import WanSamplingParams
from models.catalog import open_model
from models.pipelines.flux2 import Flux2ImagePipeline
from models.pipelines.flux2_klein import Flux2KleinImagePipeline
from models.pipelines.glm_image import GlmImagePipeline
from models.pipelines.qwen_image_edit import QwenImageEditPipeline
from models.pipelines.qwen_image_edit_plus import QwenImageEditPlusPipeline
from models.pipelines.qwen_image_layered import QwenImageLayeredPipeline
from models.pipelines.wan_image_to_video import WanExpertsImagePipeline, WanImageToVideoPipeline
from models.registry import load_registry
from models.validation import InputValidationStage
from services.coordinator.costs import costs_of, work_of


def costs(name: str, **given: ParamValue) -> dict[str, int]:
    model = open_model(name, load_registry())
    validated = InputValidationStage(model).run({"prompt": "a red apple", **given})
    return costs_of(validated.variant.services, validated.params)


def test_image_costs_scale_with_pixels_outputs_and_steps() -> None:
    given = {"height": 64, "width": 128, "num_inference_steps": 7, "num_outputs_per_prompt": 3}
    pixels = 64 * 128 * 3
    assert costs("emoji", **given) == {
        "text_encoding": 1,
        "latent_preparation": pixels,
        "denoising": pixels * 7,
        "decoding": pixels,
    }


@pytest.mark.parametrize(
    "pipeline",
    [
        Flux2ImagePipeline,
        Flux2KleinImagePipeline,
        QwenImageEditPipeline,
        QwenImageEditPlusPipeline,
        WanImageToVideoPipeline,
        WanExpertsImagePipeline,
    ],
)
def test_image_encoding_costs_scale_with_pixels(pipeline: type[ComposedPipeline]) -> None:
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


@pytest.mark.parametrize("pipeline", [GlmImagePipeline, QwenImageLayeredPipeline])
def test_a_hybrid_model_has_three_services(pipeline: type[ComposedPipeline]) -> None:
    services = pipeline(pipeline._required_config_modules).services
    assert {spec.service: spec.cost for spec in services} == {
        "before_denoising": Cost.PIXEL,
        "denoising": Cost.PIXEL_STEP,
        "decoding": Cost.PIXEL,
    }
    # The tokens of the language model are not denoising steps.
    assert [spec.service for spec in services if spec.reports_steps] == ["denoising"]
    assert [spec.resume_slot for spec in services] == [None, "resume_from", None]


def test_video_costs_scale_with_frames() -> None:
    short, long = (costs("emoji-video", num_frames=frames) for frames in (5, 9))
    assert long["denoising"] * 5 == short["denoising"] * 9
    assert long["decoding"] * 5 == short["decoding"] * 9
    assert long["text_encoding"] == short["text_encoding"] == 1


def stage_work(name: str, **given: ParamValue) -> dict[str, StageWork]:
    model = open_model(name, load_registry())
    validated = InputValidationStage(model).run({"prompt": "a red apple", **given})
    return work_of(validated.variant.services, validated.params, validated.variant.name)


def test_work_counts_steps_of_services_that_report_them() -> None:
    given = {"height": 64, "width": 128, "num_inference_steps": 7, "num_outputs_per_prompt": 3}
    pixels, shape = 64 * 128 * 3, "64x128 outputs=3 branches=1"
    assert stage_work("emoji", **given) == {
        "text_encoding": StageWork(1, 1, shape),
        "latent_preparation": StageWork(1, pixels, shape),
        "denoising": StageWork(7, pixels, shape),
        "decoding": StageWork(1, pixels, shape),
    }


def test_guidance_doubles_the_tokens_of_a_step_and_changes_the_shape() -> None:
    plain = stage_work("emoji")["denoising"]
    guided = stage_work("emoji", negative_prompt="green", true_cfg_scale=4.0)["denoising"]
    assert guided.tokens == 2 * plain.tokens
    assert guided.shape == plain.shape.replace("branches=1", "branches=2")


@pytest.mark.parametrize("negative", [None, "", "green"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("config", [PackedPipelineConfig, WanPipelineConfig])
def test_there_are_two_branches_if_a_negative_prompt_is_encoded(
    config: type[NegativePromptConfig], scale: float, negative: str | None
) -> None:
    given: dict[str, Any] = {"prompt": "x", "height": 16, "width": 16, "num_inference_steps": 1, "seed": 0}
    params: SamplingParams
    if config is WanPipelineConfig:
        params = WanSamplingParams(**given, negative_prompt=negative, guidance_scale=scale)
    else:
        params = FluxSamplingParams(**given, negative_prompt=negative, true_cfg_scale=scale)
    artifacts = params.artifacts()
    wants = cast(Any, config).wants_negative(None, artifacts["prompt"], artifacts["sampling"])
    assert params.branches == 1 + wants
