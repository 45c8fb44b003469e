"""Parity of all FLUX.2 klein stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers import Flux2KleinPipeline
from torch import Tensor

from flux2_images import IMAGE_MODES, check, check_bad_images, check_every_image_matters, files, given_images
from local_fleet import LocalFleet, open_fleet
from tiny_flux2 import build_tiny_flux2_klein

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 2}
LONG = "the old stone river on the moon and the red cat in a blue car " * 80

MODES: dict[str, dict[str, Any]] = {
    "guided": {},
    "without guidance, odd number of rows": {"height": 80, "width": 48, "guidance_scale": 1.0},
    "long prompt, few tokens": {"prompt": LONG, "max_sequence_length": 24, "num_inference_steps": 3},
    "two outputs": {"num_outputs_per_prompt": 2, "height": 32},
    "three sigmas, shift of 20 steps": {"sigmas": (1.0, 0.7, 0.3), "num_inference_steps": 20},
    "long prompt, sigmas": {"prompt": LONG, "sigmas": (1.0, 0.4), "guidance_scale": 1.0},
}


@pytest.fixture(scope="module", params=[False, True], ids=["base", "distilled"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    path = build_tiny_flux2_klein(tmp_path_factory.mktemp("flux2") / "klein", is_distilled=request.param)
    theirs = Flux2KleinPipeline.from_pretrained(path)
    theirs.set_progress_bar_config(disable=True)
    fleet = open_fleet(str(path))
    yield fleet, theirs
    fleet.close()


BASE_MODEL_ONLY = pytest.mark.parametrize("pair", [False], indirect=True, ids=["base"])
"""Mark of tests for the base model only, because the distilled model has the same code path."""


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(pair: Pair, mode: str) -> None:
    check(pair, BASE | MODES[mode])


def test_sigmas_are_shifted_for_the_default_step_count(pair: Pair) -> None:
    """For the shift, Diffusers uses num_inference_steps, whose default is 50, not the number of sigmas."""
    check(pair, {"prompt": "a red apple", "height": 64, "width": 64, "sigmas": (1.0, 0.7, 0.3)})


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_latents_and_pixels_with_reference_images_match_diffusers(pair: Pair, mode: str) -> None:
    count, given = IMAGE_MODES[mode]
    check(pair, given, given_images(count))


@BASE_MODEL_ONLY
def test_every_image_and_the_order_of_images_change_the_result(pair: Pair) -> None:
    check_every_image_matters(pair[0])


def test_guidance_changes_the_result_unless_the_model_is_distilled(pair: Pair) -> None:
    def latents(scale: float) -> Tensor:
        return pair[0].tensors(images=files(given_images(1)), **BASE, seed=1, guidance_scale=scale)["latents"]

    is_distilled = bool(pair[0].model.checkpoint.index["is_distilled"])
    assert bool((latents(1.0) == latents(4.0)).all()) is is_distilled


@BASE_MODEL_ONLY
def test_unsupported_reference_images_are_refused(pair: Pair) -> None:
    check_bad_images(pair[0])
