"""Parity of all GLM-Image stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GlmImagePipeline
from PIL import Image
from torch import Tensor

from common.errors import CheckpointError, InvalidInput
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from local_fleet import LocalFleet, RecordedCall, call_of, open_fleet, reference_run, relative_error
from models.catalog import open_model
from models.registry import load_registry
from tiny_glm_image import IMAGE_END, build_tiny_glm_image, edited

Pair = tuple[LocalFleet, Any]

SEED = 5
BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 4}
QUOTED: dict[str, Any] = {"prompt": 'a red car with "old stone" on it'}
# If the number of quoted texts is even, Diffusers prepends a token to each of them.
TWO_QUOTED: dict[str, Any] = {"prompt": "the “river” on 「猫 moon」"}

MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "quoted text": QUOTED,
    "two quoted texts": TWO_QUOTED,
    "four kinds of quotes, without guidance": {
        "prompt": "'a' \"bb\" “ccc” 「猫」 isn't it's",
        "guidance_scale": 1.0,
    },
    "without guidance": {"guidance_scale": 1.0},
    "wide": {"height": 32, "width": 128, "num_inference_steps": 9},
    "tall": {"height": 96, "width": 32},
    "large": {"height": 128, "width": 160, "num_inference_steps": 2},
    "two outputs": {"num_outputs_per_prompt": 2, **QUOTED},
    "one step": {"num_inference_steps": 1},
    "custom sigmas": {"sigmas": (1.0, 0.7, 0.45, 0.2)},
    "a crop": {"crops_coords_top_left": (16.0, 48.0)},
    "few glyph tokens": {"max_sequence_length": 4, **QUOTED},
    "empty prompt, strong guidance": {"prompt": "", "guidance_scale": 7.5},
}


@pytest.fixture(scope="module")
def quoted_latents(pair: Pair) -> Tensor:
    """This project's latents of the request with a quoted text."""
    return pair[0].tensors(**BASE | QUOTED, seed=SEED)["latents"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_glm_image(tmp_path_factory.mktemp("glm") / "image")
    theirs = GlmImagePipeline.from_pretrained(path)
    theirs.set_progress_bar_config(disable=True)
    fleet = open_fleet(str(path))
    yield fleet, theirs
    fleet.close()


@cache
def their_tokens(pipeline: Any, prompt: str, height: int, width: int) -> Tensor:
    """Prior tokens sampled by Diffusers' pipeline."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    with torch.inference_mode():
        tokens: Tensor = pipeline.generate_prior_tokens(prompt, height, width, generator=generator)[0]
    return tokens


def check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(pair: Pair, mode: str) -> None:
    """Diffusers' prior tokens are sampled once per prompt and size, and passed to its call."""
    fleet, pipeline = pair
    given = BASE | MODES[mode]
    tokens = their_tokens(pipeline, given["prompt"], given["height"], given["width"])
    theirs = reference_run(pipeline, seed=SEED, **call_of(given), prior_token_ids=tokens)
    check(fleet.tensors(seed=SEED, **given), theirs)


def test_the_whole_call_matches_diffusers(pair: Pair) -> None:
    """Diffusers' call samples the prior tokens itself."""
    fleet, pipeline = pair
    given = BASE | QUOTED
    check(fleet.tensors(seed=SEED, **given), reference_run(pipeline, seed=SEED, **call_of(given)))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 'a blue car with "old stone" on it'},
        {"prompt": 'a red car with "old river" on it'},
        {"guidance_scale": 3.0},
        {"seed": 6},
        {"max_sequence_length": 4},
        {"sigmas": (1.0, 0.7, 0.45, 0.2)},
        {"crops_coords_top_left": (512.0, 0.0)},
    ],
    ids=str,
)
def test_every_input_changes_the_result(pair: Pair, quoted_latents: Tensor, change: dict[str, Any]) -> None:
    """Negative control: each changed input moves the latents by more than 100 times the parity tolerance."""
    after = pair[0].tensors(**BASE | QUOTED | {"seed": SEED} | change)["latents"]
    assert relative_error(after, quoted_latents) > 1e-2


def test_a_truncated_quoted_text_is_reported(pair: Pair) -> None:
    recorded = RecordedCall()
    pair[0].tensors(recorded, **BASE | QUOTED, max_sequence_length=4, seed=1)
    assert recorded.warnings == [
        ("prompt", "a quoted text of 10 tokens is truncated to 4, the limit of text_encoder: old stone")
    ]


def test_progress_counts_prior_tokens_then_steps_then_decoding(pair: Pair) -> None:
    recorded = RecordedCall()
    pair[0].media(recorded, **BASE, seed=1)
    total = 16 * 16 + 4
    assert recorded.progress[:total] == [(token, total) for token in range(1, total + 1)]
    assert recorded.progress[total:] == [*((step, 4) for step in range(1, 5)), (1, 1)]


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ({"height": 80}, "height", "height: 80 is not a multiple of 32; 64 or 96 works"),
        # Diffusers accepts this width, but fails on its token count.
        ({"width": 68}, "width", "width: 68 is not a multiple of 32; 64 or 96 works"),
        ({"width": 31}, "width", "width: 31 is not a multiple of 32; 32 works"),
        ({"images": {"image": b""}}, "images", "1 is not 0; .* takes no images"),
        ({"images": {"image": b"", "image_1": b""}}, "images", "2 is not 0; .* takes no images"),
        ({"crops_coords_top_left": (1.0,)}, "crops_coords_top_left", r"a list of length 1 is not \[top, left\]"),
        ({"sigmas": (0.5, 0.7)}, "sigmas", "is not in descending order"),
        ({"max_sequence_length": 2049}, "max_sequence_length", "from 1 to 2048"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"prompt_2": "a cat"}, "prompt_2", "has no parameter 'prompt_2'"),
        ({"output_format": "mp4"}, "output_format", "png or safetensors"),
        ({"prompt": "a cat<|image|>"}, "prompt", "<.image.> is one of the model's image tokens"),
        ({"prompt": f"a cat{IMAGE_END}"}, "prompt", "<.dit_token_65.> is one of the model's image tokens"),
        ({"prompt": "z " * 8000}, "prompt", r"prompt: \d+ tokens are not at most"),
    ],
    ids=str,
)
def test_unsupported_requests_are_refused(pair: Pair, given: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        pair[0].media(**BASE | given, seed=1)
    assert caught.value.field == field


def test_image_editing_fails_in_diffusers(pair: Pair) -> None:
    """Images are refused because Diffusers fails on them. The test fails once Diffusers supports editing."""
    with pytest.raises(RuntimeError, match=r"expected input.* to have 32 channels, but got 1 channels instead"):
        pair[1](image=[Image.new("RGB", (64, 64))], **call_of(BASE), generator=torch.Generator().manual_seed(1))


def test_a_directory_saved_by_diffusers_is_served(pair: Pair, tmp_path: Path) -> None:
    """Diffusers records its pipeline package, not transformers, as the library of transformers classes."""
    modules = {
        "processor": ["glm_image", "GlmImageProcessor"],
        "vision_language_encoder": ["glm_image", "GlmImageForConditionalGeneration"],
    }
    path = edited(pair[0].model.checkpoint.path, tmp_path / "copy", "", "model_index.json", modules)
    fleet = open_fleet(str(path))
    assert torch.equal(*(each.tensors(seed=SEED, **BASE)["latents"] for each in (fleet, pair[0])))
    fleet.close()


def test_a_library_that_is_not_a_package_is_refused(pair: Pair, tmp_path: Path) -> None:
    modules = {"processor": ["os.path", "GlmImageProcessor"]}
    path = edited(pair[0].model.checkpoint.path, tmp_path / "copy", "", "model_index.json", modules)
    with pytest.raises(CheckpointError, match=r"library 'os\.path' is not supported"):
        open_fleet(str(path))


@pytest.mark.usefixtures("rounded_noise")
def test_bfloat16_gives_finite_float32_latents(pair: Pair) -> None:
    """Latents are not compared, because prior tokens may differ between dtypes."""
    bfloat16 = open_fleet(str(pair[0].model.checkpoint.path), torch.bfloat16)
    ours = bfloat16.tensors(**BASE, seed=SEED)["latents"]
    bfloat16.close()
    assert ours.dtype == torch.float32, "Diffusers steps in float32"
    assert bool(ours.isfinite().all())


@pytest.mark.parametrize(
    ("folder", "file", "entries", "message"),
    [
        ("transformer", "config.json", {"in_channels": 8}, "8 input and 16 output channels are not 16"),
        ("transformer", "config.json", {"text_embed_dim": 48}, "text_encoder: 32 text features are not 48"),
        ("vae", "config.json", {"block_out_channels": [8, 8, 16]}, "block_out_channels"),
        ("vae", "config.json", {"latents_mean": [0.0]}, "latents_mean"),
    ],
)
def test_inconsistent_modules_are_refused(
    tmp_path: Path, pair: Pair, folder: str, file: str, entries: dict[str, Any], message: str
) -> None:
    path = edited(pair[0].model.checkpoint.path, tmp_path / "edited", folder, file, entries)
    with pytest.raises(CheckpointError, match=message):
        GlmImagePipelineConfig.from_checkpoint(open_model(str(path), load_registry()).checkpoint)
