"""FLUX.2 klein through all of its stages, against Diffusers' pipeline with the same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers import Flux2KleinPipeline

from local_fleet import LocalFleet, call_of, open_fleet, reference_run, relative_error
from tiny_flux2 import build_tiny_flux2_klein

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 2}
LONG = "the old stone river on the moon and the red cat in a blue car " * 80

MODES: dict[str, dict[str, Any]] = {
    "guided": {},
    "without guidance, odd rows": {"height": 80, "width": 48, "guidance_scale": 1.0},
    "long prompt, few tokens": {"prompt": LONG, "max_sequence_length": 24, "num_inference_steps": 3},
    "two outputs": {"num_outputs_per_prompt": 2, "height": 32},
    "sigmas, shift of more steps": {"sigmas": (1.0, 0.7, 0.3), "num_inference_steps": 20},
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


def check(pair: Pair, given: dict[str, Any]) -> None:
    fleet, pipeline = pair
    theirs = reference_run(pipeline, seed=5, **call_of(given))
    ours = fleet.tensors(seed=5, **given)
    assert ours["latents"].shape == theirs["latents"].shape
    assert ours["pixels"].shape == theirs["pixels"].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "a flat image would prove nothing"


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_are_diffusers(pair: Pair, mode: str) -> None:
    check(pair, BASE | MODES[mode])


def test_sigmas_are_shifted_for_the_default_number_of_steps(pair: Pair) -> None:
    """Not for the number of sigmas: Diffusers takes the argument, whose default is 50."""
    check(pair, {"prompt": "a red apple", "height": 64, "width": 64, "sigmas": (1.0, 0.7, 0.3)})
