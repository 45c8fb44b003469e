"""Parity of all Qwen-Image stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline

from common.errors import CheckpointError, InvalidInput
from configs.pipeline_configs.qwen_image import TEMPLATE, QwenImagePipelineConfig
from local_fleet import LocalFleet, RecordedCall, call_of, open_fleet, reference_run, relative_error
from models.catalog import open_model
from models.registry import load_registry
from tiny_qwen_image import build_tiny_qwen_image, qwen_tokenizer

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 4}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car"}
LONG = "the old stone river on the moon and the red cat in a blue car " * 80

MODES: dict[str, dict[str, Any]] = {
    "square": GUIDED,
    "wide": {"height": 48, "width": 96, **GUIDED},
    "tall without guidance": {"height": 112, "width": 32},
    "odd rows and columns": {"height": 80, "width": 48, **GUIDED},
    "smallest": {"height": 16, "width": 16, **GUIDED},
    "large": {"height": 384, "width": 512, "num_inference_steps": 2},
    "true CFG scale of 1": {**GUIDED, "true_cfg_scale": 1.0},
    "empty negative prompt": {"negative_prompt": "", "true_cfg_scale": 2.0},
    "empty prompt": {"prompt": "", **GUIDED},
    "long prompt": {"prompt": LONG, "negative_prompt": LONG[9:]},
    "long prompt, most tokens": {"prompt": LONG, "max_sequence_length": 1024},
    "few tokens": {"prompt": LONG, "max_sequence_length": 3, **GUIDED},
    "odd text": {"prompt": "\n\nZürich \t 42 <|im_end|> <|endoftext|>\n<|im_start|> '; 猫 \u200b {}"},
    "two steps": {"num_inference_steps": 2, **GUIDED},
    "many steps": {"num_inference_steps": 9},
    "custom sigmas": {"sigmas": (1.0, 0.7, 0.45, 0.2), **GUIDED},
    "one custom sigma": {"sigmas": (0.6,)},
    "two outputs": {"num_outputs_per_prompt": 2},
    "three outputs with guidance": {"num_outputs_per_prompt": 3, "height": 32, **GUIDED},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_qwen_image(tmp_path_factory.mktemp("qwen") / "image")
    theirs = QwenImagePipeline.from_pretrained(path)
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
        {"negative_prompt": ""},
        {"true_cfg_scale": 6.0},
        {"seed": 6},
        {"max_sequence_length": 2},
        {"sigmas": (1.0, 0.7, 0.45, 0.2)},
    ],
    ids=str,
)
def test_every_input_changes_the_result(pair: Pair, change: dict[str, Any]) -> None:
    """Negative control: each changed input moves the latents by more than 100 times the parity tolerance."""
    given = BASE | GUIDED | {"seed": 5}
    before, after = (pair[0].tensors(**each)["latents"] for each in (given, given | change))
    assert relative_error(after, before) > 1e-2


def test_a_truncated_prompt_is_reported(pair: Pair) -> None:
    recorded = RecordedCall()
    given = BASE | {"prompt": "a old stone river", "max_sequence_length": 2, "negative_prompt": "a red cat"}
    pair[0].tensors(recorded, **given, seed=1)
    assert recorded.warnings == [
        ("prompt", "4 tokens are truncated to 2, the limit of text_encoder; removed:  stone river"),
        ("negative_prompt", "3 tokens are truncated to 2, the limit of text_encoder; removed:  cat"),
    ]


@pytest.mark.parametrize("length", [4, 512])
def test_a_prompt_that_fits_is_not_reported(pair: Pair, length: int) -> None:
    recorded = RecordedCall()
    pair[0].tensors(recorded, **BASE | {"prompt": "a old stone river", "max_sequence_length": length}, seed=1)
    assert recorded.warnings == []


def test_the_skipped_tokens_are_those_before_the_prompt() -> None:
    assert len(qwen_tokenizer()(TEMPLATE.before).input_ids) == TEMPLATE.skipped


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"sigmas": (1.0,)}, "sigmas"),
        ({"sigmas": (1.0, 1.0)}, "sigmas"),
        ({"sigmas": (0.5, 0.7)}, "sigmas"),
        ({"max_sequence_length": 1025}, "max_sequence_length"),
        ({"height": 15}, "height"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale"),
        ({"prompt_2": "a cat"}, "prompt_2"),
        ({"output_format": "mp4"}, "output_format"),
        ({"images": {"image": b""}}, "images"),
    ],
    ids=str,
)
def test_unsupported_requests_are_refused(pair: Pair, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pair[0].media(**BASE | given, seed=1)
    assert caught.value.field == field


@pytest.mark.usefixtures("rounded_noise")
def test_bfloat16_is_close_to_float32(pair: Pair) -> None:
    given = BASE | {"seed": 5}
    bfloat16 = open_fleet(str(pair[0].model.checkpoint.path), torch.bfloat16)
    ours = bfloat16.tensors(**given)["latents"]
    bfloat16.close()
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, pair[0].tensors(**given)["latents"]) < 0.1


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    checkpoint = open_model(str(build_tiny_qwen_image(tmp_path / "m", text_size=48)), load_registry()).checkpoint
    with pytest.raises(CheckpointError, match="text_encoder: 48 text features are not 32"):
        QwenImagePipelineConfig.from_checkpoint(checkpoint)
