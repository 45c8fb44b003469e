"""Parity of all Z-Image stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline

from common.errors import CheckpointError, InvalidInput
from configs.pipeline_configs.z_image import ZImagePipelineConfig
from local_fleet import LocalFleet, RecordedCall, call_of, open_fleet, reference_run, relative_error
from models.catalog import open_model
from models.registry import load_registry
from tiny_z_image import build_tiny_z_image

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 32, "num_inference_steps": 3}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car"}
LONG = "the old stone river on the moon and the red cat in a blue car " * 80

MODES: dict[str, dict[str, Any]] = {
    "guided": GUIDED,
    "without guidance": {"guidance_scale": 0.0, "height": 48, "width": 80},
    "scale of 1, negative prompt unset": {"guidance_scale": 1.0, "num_inference_steps": 1},
    "two outputs, limited norm": {"num_outputs_per_prompt": 2, "cfg_normalization": True, **GUIDED},
    "norm limited to one half": {"cfg_normalization": 0.5, **GUIDED},
    "truncated guidance": {"cfg_truncation": 0.15, "num_inference_steps": 4, **GUIDED},
    "long prompt and empty negative prompt": {"prompt": LONG, "negative_prompt": ""},
    "few tokens": {"prompt": LONG, "max_sequence_length": 33, "guidance_scale": 0.0},
    "odd text": {"prompt": "\n\nZürich \t 42 <|endoftext|>\n '; 猫 \u200b {}", "guidance_scale": 0.0},
    "custom sigmas": {"sigmas": (1.0, 0.7, 0.2), **GUIDED},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_z_image(tmp_path_factory.mktemp("z") / "image")
    theirs = ZImagePipeline.from_pretrained(path)
    theirs.set_progress_bar_config(disable=True)
    fleet = open_fleet(str(path))
    yield fleet, theirs
    fleet.close()


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(pair: Pair, mode: str) -> None:
    fleet, pipeline = pair
    given = BASE | MODES[mode]
    theirs = reference_run(pipeline, seed=5, **call_of(given))
    ours = fleet.tensors(seed=5, **given)
    assert ours["latents"].dtype == theirs["latents"].dtype == torch.float32
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue apple"},
        {"negative_prompt": "a red car"},
        {"guidance_scale": 4.0},
        {"cfg_normalization": 0.9},
        {"cfg_truncation": 0.15},
        {"seed": 6},
        {"max_sequence_length": 4},
    ],
    ids=str,
)
def test_every_input_changes_the_result(pair: Pair, change: dict[str, Any]) -> None:
    given = BASE | GUIDED | {"seed": 5}
    before, after = (pair[0].tensors(**each)["latents"] for each in (given, given | change))
    assert relative_error(after, before) > 1e-2


def test_a_truncated_prompt_and_parameters_without_effect_are_reported(pair: Pair) -> None:
    recorded = RecordedCall()
    pair[0].tensors(
        recorded, **BASE | {"prompt": "a old stone river", "max_sequence_length": 5}, guidance_scale=0.0, seed=1
    )
    message = "7 tokens are truncated to 5, the limit of text_encoder; removed:  stone river"
    assert recorded.warnings == [("prompt", message)]
    _, warnings = (
        pair[0]
        .model.variants[0]
        .sampling_params.build(
            {**BASE, **GUIDED, "guidance_scale": 0.0, "cfg_truncation": 0.5}, pair[0].model.checkpoint
        )
    )
    assert [warning.field for warning in warnings] == ["negative_prompt", "cfg_truncation"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"height": 40}, "height"),
        ({"width": 8}, "width"),
        ({"sigmas": (0.5, 0.7)}, "sigmas"),
        ({"max_sequence_length": 961}, "max_sequence_length"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"cfg_normalization": "most"}, "cfg_normalization"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale"),
        ({"output_format": "mp4"}, "output_format"),
        ({"images": {"image": b""}}, "images"),
    ],
    ids=str,
)
def test_unsupported_requests_are_refused(pair: Pair, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pair[0].media(**BASE | given, seed=1)
    assert caught.value.field == field


def test_a_refused_size_names_the_nearest_valid_sizes(pair: Pair) -> None:
    with pytest.raises(InvalidInput, match="height: 40 is not a multiple of 16; 32 or 48 works"):
        pair[0].media(**BASE | {"height": 40}, seed=1)


def test_bfloat16_is_close_to_float32_with_float32_latents(pair: Pair) -> None:
    given = BASE | {"seed": 5, "guidance_scale": 0.0}
    bfloat16 = open_fleet(str(pair[0].model.checkpoint.path), torch.bfloat16)
    ours = bfloat16.tensors(**given)["latents"]
    bfloat16.close()
    assert ours.dtype == torch.float32
    assert relative_error(ours, pair[0].tensors(**given)["latents"]) < 0.1


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    checkpoint = open_model(str(build_tiny_z_image(tmp_path / "m", text_size=48)), load_registry()).checkpoint
    with pytest.raises(CheckpointError, match="text_encoder: 48 text features are not 32"):
        ZImagePipelineConfig.from_checkpoint(checkpoint)
