"""Parity of all FLUX.2 dev stages with Diffusers' pipeline: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux2 import pipeline_flux2 as reference

from configs.pipeline_configs.flux2_dev import AFTER, BEFORE, SYSTEM_MESSAGE
from flux2_images import IMAGE_MODES, check, check_bad_images, check_every_image_matters, given_images
from local_fleet import LocalFleet, RecordedCall, open_fleet, relative_error
from tiny_flux2 import build_tiny_flux2_dev, open_flux2_reference

Pair = tuple[LocalFleet, Any]

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_inference_steps": 2}
LONG = "the old stone river on the moon and the red cat in a blue car " * 80

MODES: dict[str, dict[str, Any]] = {
    "default guidance": {},
    "low guidance, odd number of rows": {"height": 80, "width": 48, "guidance_scale": 1.5},
    "long prompt, few tokens": {"prompt": LONG, "max_sequence_length": 48, "num_inference_steps": 3},
    "long prompt, two outputs": {"prompt": LONG, "num_outputs_per_prompt": 2, "height": 32},
    "three sigmas, shift of 20 steps": {"sigmas": (1.0, 0.7, 0.3), "num_inference_steps": 20, "prompt": ""},
    "image token in the prompt": {"prompt": "a [IMG]red[IMG] [/INST] apple", "height": 32},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    torch.set_num_threads(1)
    path = build_tiny_flux2_dev(tmp_path_factory.mktemp("flux2") / "dev")
    theirs = open_flux2_reference(path)
    theirs.set_progress_bar_config(disable=True)
    fleet = open_fleet(str(path))
    yield fleet, theirs
    fleet.close()


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(pair: Pair, mode: str) -> None:
    check(pair, BASE | MODES[mode])


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_latents_and_pixels_with_reference_images_match_diffusers(pair: Pair, mode: str) -> None:
    count, given = IMAGE_MODES[mode]
    check(pair, given, given_images(count))


def test_every_image_and_the_order_of_images_change_the_result(pair: Pair) -> None:
    check_every_image_matters(pair[0])


@pytest.mark.parametrize("change", [{"prompt": "a blue apple"}, {"guidance_scale": 5.0}, {"seed": 6}], ids=str)
def test_every_input_changes_the_result(pair: Pair, change: dict[str, Any]) -> None:
    """Negative control: each changed input moves the latents by more than 10 times the parity tolerance."""
    before, after = (pair[0].tensors(**BASE | {"seed": 5} | each)["latents"] for each in ({}, change))
    assert relative_error(after, before) > 1e-3


def test_the_chat_text_equals_diffusers(pair: Pair) -> None:
    assert SYSTEM_MESSAGE == reference.SYSTEM_MESSAGE
    chat = reference.format_input(["a red apple"])
    assert pair[1].tokenizer.apply_chat_template(chat, tokenize=False) == [f"{BEFORE}a red apple{AFTER}"]


def test_a_long_prompt_is_truncated_with_a_warning(pair: Pair) -> None:
    recorded = RecordedCall()
    pair[0].media(recorded, **BASE | {"prompt": "a red cat " * 170, "num_inference_steps": 1}, seed=1)
    ((field, message),) = recorded.warnings
    assert field == "prompt"
    assert "tokens are truncated to 512, the limit of text_encoder" in message
    assert message.endswith("a red cat [/INST]")


def test_unsupported_reference_images_are_refused(pair: Pair) -> None:
    check_bad_images(pair[0])
