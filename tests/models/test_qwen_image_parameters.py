"""Parity of Qwen-Image's SamplingParams with Diffusers: names, defaults, rounding, limits."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
)

from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.sample.qwen_image import (
    QwenImageEditPlusSamplingParams,
    QwenImageEditSamplingParams,
    QwenImageSamplingParams,
)
from tiny_qwen_image import build_tiny_qwen_image

RENAMED = {"num_images_per_prompt": "num_outputs_per_prompt"}
# Arguments without a request parameter: tensors, input images, callbacks and the form of the return value.
NOT_SERVED = {
    "image",
    "latents",
    "prompt_embeds",
    "prompt_embeds_mask",
    "negative_prompt_embeds",
    "negative_prompt_embeds_mask",
    "attention_kwargs",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "return_dict",
    "self",
    # Requests have seed and output_format instead.
    "generator",
    "output_type",
}
# Diffusers ignores this argument if the transformer has no guidance embedding; its default is None.
IGNORED = {"guidance_scale"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_tiny_qwen_image(tmp_path_factory.mktemp("parameters") / "qwen"))


@pytest.fixture(scope="module")
def theirs(checkpoint: Checkpoint) -> Any:
    return QwenImagePipeline.from_pretrained(checkpoint.path)


@pytest.mark.parametrize(
    ("pipeline", "params"),
    [
        (QwenImagePipeline, QwenImageSamplingParams),
        (QwenImageEditPipeline, QwenImageEditSamplingParams),
        (QwenImageEditPlusPipeline, QwenImageEditPlusSamplingParams),
    ],
    ids=["image", "edit", "edit plus"],
)
def test_every_supported_argument_of_diffusers_is_a_parameter_with_the_same_default(
    checkpoint: Checkpoint, pipeline: Any, params: type[QwenImageSamplingParams]
) -> None:
    arguments = inspect.signature(pipeline.__call__).parameters
    specs = {spec.name: spec for spec in params.parameters(checkpoint)}
    served = {RENAMED.get(name, name) for name in arguments.keys() - NOT_SERVED}
    assert served | {"seed", "output_format"} == specs.keys()
    for name in arguments.keys() - NOT_SERVED - IGNORED - {"height", "width"}:
        assert specs[RENAMED.get(name, name)].default == arguments[name].default, name


def test_the_default_size_equals_diffusers(checkpoint: Checkpoint, theirs: Any) -> None:
    ours, warnings = QwenImageSamplingParams.build({"prompt": ""}, checkpoint)
    assert ours.height == ours.width == theirs.default_sample_size * theirs.vae_scale_factor == 1024
    assert warnings == ()


@pytest.mark.parametrize("height", [16, 17, 31, 32, 120])
def test_sizes_round_as_in_diffusers(checkpoint: Checkpoint, theirs: Any, height: int) -> None:
    ours, warnings = QwenImageSamplingParams.build({"prompt": "", "height": height, "width": 48}, checkpoint)
    pixels = theirs("a", height=height, width=48, num_inference_steps=2, output_type="pt").images
    assert tuple(pixels.shape) == (1, 3, ours.height, ours.width)
    assert [warning.field for warning in warnings] == (["height"] if ours.height != height else [])


@pytest.mark.parametrize(
    ("given", "without_effect"),
    [
        ({}, []),
        ({"true_cfg_scale": 3.0}, ["true_cfg_scale"]),
        ({"true_cfg_scale": 3.0, "negative_prompt": ""}, []),
        ({"true_cfg_scale": 1.0, "negative_prompt": "a"}, ["negative_prompt"]),
        ({"guidance_scale": 3.0}, ["guidance_scale"]),
        ({"sigmas": (1.0, 0.5, 0.2), "num_inference_steps": 7}, ["num_inference_steps"]),
    ],
    ids=str,
)
def test_parameters_without_effect_are_reported(
    checkpoint: Checkpoint, given: dict[str, Any], without_effect: list[str]
) -> None:
    _, warnings = QwenImageSamplingParams.build({"prompt": "", **given}, checkpoint)
    assert [warning.field for warning in warnings] == without_effect


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize(
    ("sigmas", "is_finite"), [((1.0,), False), ((1.0, 1.0), False), ((1.0, 0.9999), True), ((0.5,), True)], ids=str
)
def test_sigmas_are_refused_if_the_schedule_of_diffusers_is_not_finite(
    checkpoint: Checkpoint, theirs: Any, sigmas: tuple[float, ...], is_finite: bool
) -> None:
    """With shift_terminal, Diffusers' scheduler divides by 0 if the last sigma is 1."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(sigmas=list(sigmas), mu=0.9)
    assert bool(scheduler.sigmas.isfinite().all()) == is_finite
    given: dict[str, Any] = {"prompt": "", "sigmas": sigmas}
    if is_finite:
        QwenImageSamplingParams.build(given, checkpoint)
    else:
        with pytest.raises(InvalidInput, match="the last value, is not at most"):
            QwenImageSamplingParams.build(given, checkpoint)


def test_one_step_is_refused_only_with_shift_terminal(tmp_path: Path, checkpoint: Checkpoint) -> None:
    given: dict[str, Any] = {"prompt": "", "num_inference_steps": 1}
    with pytest.raises(InvalidInput, match="at least 2"):
        QwenImageSamplingParams.build(given, checkpoint)
    path = build_tiny_qwen_image(tmp_path / "without_shift_terminal")
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"shift_terminal": 0.02', '"shift_terminal": null'))
    assert QwenImageSamplingParams.build(given, Checkpoint.open(path))[0].num_inference_steps == 1
