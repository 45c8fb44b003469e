"""Parity of latents and pixels with Diffusers' FluxPipeline, in each of its modes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flux_pair import Pair, open_pair
from local_fleet import RecordedCall, reference_run, relative_error

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 4}
LONG = "the old stone river on the moon and the red cat in a blue car " * 12

MODES: dict[str, dict[str, Any]] = {
    "square": {},
    "wide": {"height": 48, "width": 96},
    "tall": {"height": 112, "width": 32},
    "smallest": {"height": 16, "width": 16},
    "large": {"height": 512, "width": 384, "num_inference_steps": 2},
    "strong embedded guidance": {"guidance_scale": 7.25},
    "embedded guidance of 0": {"guidance_scale": 0.0},
    "one step": {"num_inference_steps": 1},
    "many steps": {"num_inference_steps": 9},
    "true CFG": {"negative_prompt": "a blue car", "true_cfg_scale": 3.5},
    "empty negative prompt": {"negative_prompt": "", "true_cfg_scale": 2.0},
    "negative prompt without a true CFG scale": {"negative_prompt": "a blue car"},
    "two prompts": {"prompt_2": "a blue cat on the moon"},
    "empty second prompt": {"prompt_2": ""},
    "two negative prompts": {"negative_prompt": "car", "negative_prompt_2": "the moon", "true_cfg_scale": 1.5},
    "empty prompt": {"prompt": ""},
    "long prompt": {"prompt": LONG},
    "few tokens": {"prompt": LONG, "max_sequence_length": 8},
    "odd text": {"prompt": "Zürich \t 42\n\n<|endoftext|> </s> '; 猫 \u200b"},
    "custom sigmas": {"sigmas": (1.0, 0.7, 0.45, 0.2, 0.05), "num_inference_steps": 5},
    "two outputs": {"num_outputs_per_prompt": 2},
    "two outputs with true CFG": {"num_outputs_per_prompt": 2, "negative_prompt": "car", "true_cfg_scale": 2.0},
}


def compare(pair: Pair, given: dict[str, Any], seed: int = 5) -> dict[str, torch.Tensor]:
    """Run both pipelines; asserts latents within 1e-4 relative L2 error and pixels within 1e-3.

    Returns this project's result.
    """
    call = {name: value for name, value in given.items() if name not in ("num_outputs_per_prompt", "sigmas")}
    if "sigmas" in given:
        call["sigmas"] = list(given["sigmas"])
    theirs = reference_run(pair.theirs, seed=seed, num_images_per_prompt=given.get("num_outputs_per_prompt", 1), **call)
    ours = pair.ours.tensors(seed=seed, **given)
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert ours["pixels"].dtype == torch.float32
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert (ours["pixels"] - theirs["pixels"]).abs().max() <= 1e-3
    return ours


@pytest.mark.parametrize("mode", MODES)
def test_dev_matches_diffusers(dev: Pair, mode: str) -> None:
    compare(dev, BASE | {"max_sequence_length": 32} | MODES[mode])


@pytest.mark.parametrize("mode", ["square", "wide", "one step", "true CFG", "two outputs", "custom sigmas"])
def test_schnell_matches_diffusers(schnell: Pair, mode: str) -> None:
    compare(schnell, BASE | {"max_sequence_length": 32} | MODES[mode])


def test_the_default_of_512_text_tokens_matches_diffusers(dev: Pair) -> None:
    compare(dev, BASE | {"prompt": LONG})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue apple"},
        {"prompt_2": "a blue apple"},
        {"seed": 6},
        {"guidance_scale": 4.0},
        {"negative_prompt": "", "true_cfg_scale": 1.5},
        {"max_sequence_length": 28},
    ],
    ids=str,
)
def test_every_input_changes_the_result(dev: Pair, change: dict[str, Any]) -> None:
    """Negative control: each changed input moves the latents by more than 100 times the parity tolerance."""
    given = BASE | {"seed": 5, "max_sequence_length": 32}
    before, after = dev.ours.tensors(**given)["latents"], dev.ours.tensors(**given | change)["latents"]
    assert relative_error(after, before) > 1e-2


def test_outputs_of_one_request_differ(dev: Pair) -> None:
    pixels = dev.ours.tensors(**BASE, seed=5, num_outputs_per_prompt=2)["pixels"]
    assert (pixels[0] - pixels[1]).abs().max() > 0.1


def test_png_pixels_equal_diffusers(dev: Pair) -> None:
    given = BASE | {"max_sequence_length": 32}
    images = dev.ours.images(seed=5, num_outputs_per_prompt=2, **given)
    generator = torch.Generator("cpu").manual_seed(5)
    theirs = dev.theirs(**given, num_images_per_prompt=2, generator=generator).images
    assert len(images) == len(theirs) == 2
    for image, reference in zip(images, theirs, strict=True):
        difference = np.asarray(image).astype(int) - np.asarray(reference).astype(int)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 1e-3


def test_the_shipped_model_matches_diffusers() -> None:
    """The shipped model with its defaults, compared with Diffusers on the same directory."""
    given = {"prompt": "a green apple on a yellow background", "height": 128, "width": 128}
    with open_pair("emoji") as emoji:
        compare(emoji, given | {"num_inference_steps": 20, "max_sequence_length": 64}, seed=7)


@pytest.mark.usefixtures("rounded_noise")
def test_bfloat16_is_as_accurate_as_in_diffusers(dev: Pair) -> None:
    """The error against float32 is less than 1.5 times the error of Diffusers in bfloat16."""
    given = BASE | {"max_sequence_length": 32}
    with open_pair(dev.path, torch.bfloat16) as bfloat16:
        ours = bfloat16.ours.tensors(seed=5, **given)
        theirs = reference_run(bfloat16.theirs, seed=5, **given)
    exact = dev.ours.tensors(seed=5, **given)
    assert ours["latents"].dtype == torch.bfloat16
    their_error = relative_error(theirs["latents"], exact["latents"])
    assert relative_error(ours["latents"], exact["latents"]) < 1.5 * their_error


def test_progress_is_reported_for_every_step(dev: Pair) -> None:
    recorded = RecordedCall()
    dev.ours.tensors(recorded, **BASE, seed=1)
    assert [each for each in recorded.progress if each[1] == 4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
