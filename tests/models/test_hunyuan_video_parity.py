"""Parity of all HunyuanVideo stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline

from common.errors import CheckpointError, InvalidInput
from configs.pipeline_configs.hunyuan_video import TEMPLATE, HunyuanVideoPipelineConfig
from local_fleet import RecordedCall, open_fleet, reference_run, relative_error
from models.catalog import open_model
from models.registry import load_registry
from tiny_hunyuan_video import build_tiny_hunyuan_video, llama_tokenizer
from wan_pair import Pair, check, open_pair

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}
LONG = "the old stone river on the moon and the red cat in a blue car " * 30

MODES: dict[str, dict[str, Any]] = {
    "embedded guidance": {},
    "other embedded guidance, one frame": {"guidance_scale": 1.0, "num_frames": 1},
    "true CFG, two outputs": {"num_outputs_per_prompt": 2, "height": 48, **GUIDED},
    "empty negative prompt": {**GUIDED, "negative_prompt": ""},
    "more frames, wide": {"num_frames": 9, "width": 48, "num_inference_steps": 3},
    "long prompts": {"prompt": LONG, **GUIDED, "negative_prompt": LONG[9:]},
    "few tokens": {"prompt": LONG, "max_sequence_length": 3},
    "odd text": {"prompt": "\n\nZürich \t 42 <|eot_id|> '; 猫 \u200b {}"},
    "custom sigmas": {"sigmas": (1.0, 0.7, 0.2)},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = open_pair(build_tiny_hunyuan_video(tmp_path_factory.mktemp("hunyuan") / "video"), HunyuanVideoPipeline)
    yield pair
    pair[0].close()


def reference_call(given: dict[str, Any]) -> dict[str, Any]:
    """Convert request parameters to arguments of Diffusers' call."""
    call = {**given, "num_videos_per_prompt": given.get("num_outputs_per_prompt", 1)}
    call.pop("num_outputs_per_prompt", None)
    return call | ({"sigmas": list(given["sigmas"])} if "sigmas" in given else {})


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(pair: Pair, mode: str) -> None:
    fleet, pipeline = pair
    given = BASE | MODES[mode]
    check(fleet.tensors(seed=5, **given), reference_run(pipeline, seed=5, **reference_call(given)))


@pytest.mark.parametrize("num_frames", [6, 8])
def test_frame_counts_are_rounded_as_in_diffusers_with_a_warning(pair: Pair, num_frames: int) -> None:
    """Diffusers rounds without a warning."""
    recorded = RecordedCall()
    given = BASE | {"num_frames": num_frames, "num_inference_steps": 1}
    ours = pair[0].tensors(recorded, seed=5, **given)
    check(ours, reference_run(pair[1], seed=5, **reference_call(given)))
    _, warnings = pair[0].model.variants[0].sampling_params.build(given, pair[0].model.checkpoint)
    message = f"{num_frames} is not one more than a multiple of 4; 5 is used instead"
    assert [(warning.field, warning.message) for warning in warnings] == [("num_frames", message)]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue apple"},
        {"prompt_2": "a blue cat"},
        {"negative_prompt": "a red car"},
        {"negative_prompt_2": "a red river"},
        {"true_cfg_scale": 4.0},
        {"guidance_scale": 1.0},
        {"seed": 6},
        {"max_sequence_length": 2},
    ],
    ids=str,
)
def test_every_input_changes_the_result(pair: Pair, change: dict[str, Any]) -> None:
    given = BASE | GUIDED | {"seed": 5}
    before, after = (pair[0].tensors(**each)["latents"] for each in (given, given | change))
    assert relative_error(after, before) > 1e-3


def test_prompt_2_is_encoded_by_clip(pair: Pair) -> None:
    """Diffusers 0.42 ignores prompt_2; the reference therefore gets both encoders' embeddings."""
    fleet, pipeline = pair
    with torch.inference_mode():
        _, pooled, _ = pipeline.encode_prompt("a blue cat")
        embeds, _, mask = pipeline.encode_prompt(BASE["prompt"])
    given = {name: value for name, value in BASE.items() if name != "prompt"}
    encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    theirs = reference_run(pipeline, seed=5, **given, **encoded)
    check(fleet.tensors(seed=5, prompt_2="a blue cat", **BASE), theirs)


def test_a_truncated_prompt_is_reported(pair: Pair) -> None:
    recorded = RecordedCall()
    pair[0].tensors(recorded, **BASE | {"prompt": "a old stone river", "max_sequence_length": 2}, seed=1)
    message = "4 tokens are truncated to 2, the limit of text_encoder; removed:  stone river"
    assert recorded.warnings == [("prompt", message)]


def test_the_skipped_tokens_are_those_before_the_prompt() -> None:
    assert len(llama_tokenizer()(TEMPLATE.before).input_ids) == TEMPLATE.skipped


def test_parameters_without_effect_are_reported(pair: Pair) -> None:
    given = {**BASE, "negative_prompt": "a blue car", "negative_prompt_2": "a car"}
    for more, expected in (
        ({}, ["negative_prompt", "negative_prompt_2"]),
        ({"negative_prompt": None, "true_cfg_scale": 2.0}, ["true_cfg_scale", "negative_prompt_2"]),
    ):
        request = {name: value for name, value in {**given, **more}.items() if value is not None}
        params, warnings = pair[0].model.variants[0].sampling_params.build(request, pair[0].model.checkpoint)
        assert sorted(warning.field for warning in warnings) == sorted(expected)
        assert params.branches == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"height": 40}, "height"),
        ({"width": 8}, "width"),
        ({"num_frames": 0}, "num_frames"),
        ({"sigmas": (0.5, 0.7)}, "sigmas"),
        ({"max_sequence_length": 1025}, "max_sequence_length"),
        ({"output_format": "png"}, "output_format"),
        ({"images": {"image": b""}}, "images"),
    ],
    ids=str,
)
def test_unsupported_requests_are_refused(pair: Pair, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pair[0].media(**BASE | given, seed=1)
    assert caught.value.field == field


def test_a_model_without_embedded_guidance_matches_diffusers(tmp_path: Path) -> None:
    path = build_tiny_hunyuan_video(tmp_path / "m", guidance_embeds=False)
    fleet, pipeline = open_pair(path, HunyuanVideoPipeline)
    check(fleet.tensors(seed=5, **BASE), reference_run(pipeline, seed=5, **BASE))
    _, warnings = fleet.model.variants[0].sampling_params.build({**BASE, "guidance_scale": 2.0}, fleet.model.checkpoint)
    assert [warning.field for warning in warnings] == ["guidance_scale"]
    fleet.close()


def test_bfloat16_is_close_to_float32(pair: Pair) -> None:
    given = BASE | {"seed": 5}
    bfloat16 = open_fleet(str(pair[0].model.checkpoint.path), torch.bfloat16)
    ours = bfloat16.tensors(**given)["latents"]
    bfloat16.close()
    assert relative_error(ours, pair[0].tensors(**given)["latents"]) < 0.1


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    checkpoint = open_model(str(build_tiny_hunyuan_video(tmp_path / "m", text_size=48)), load_registry()).checkpoint
    with pytest.raises(CheckpointError, match="text_encoder: 48 text features are not 32"):
        HunyuanVideoPipelineConfig.from_checkpoint(checkpoint)
