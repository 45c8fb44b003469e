"""The emoji model follows its prompts, including color-noun pairs that are held out of training.

Twenty prompts, each with its position as seed, are compared with 64 candidate images: one for each prompt, and 44
others, mostly the same nouns in other colors. The similarity measure is not learned: both images are reduced to the
mean colors of a 16x16 grid; the candidate with the smallest squared distance is the match. Chance level is 1/64.

tests/golden/emoji_references.png was rendered from the training images (see the model card) by code independent of the
training code. Each emoji is on white, at 84% of a 128-pixel square. A named color replaces the hue of the pixels within
about 50 degrees of the emoji's dominant hue, or of the pale pixels if the emoji has no vivid color. The image is then
averaged down to 32 pixels. The .json file next to it names the tiles row by row; "held_out" lists the first ten
held-out color-noun pairs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from local_fleet import open_fleet
from models.catalog import DEFAULT_MODEL, open_model
from models.registry import load_registry

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = 16

Draw = Callable[[str, int], Image.Image]


class References:
    """Candidate images by name, and the names that are prompts."""

    def __init__(self) -> None:
        sheet_info: dict[str, Any] = json.loads((GOLDEN / "emoji_references.json").read_text())
        self.trained: list[str] = sheet_info["trained"]
        self.held_out: list[str] = sheet_info["held_out"]
        self.names: list[str] = [*self.trained, *self.held_out, *sheet_info["others"]]
        sheet, side, columns = Image.open(GOLDEN / "emoji_references.png"), sheet_info["tile"], sheet_info["columns"]
        boxes = [(i % columns * side, i // columns * side) for i in range(len(self.names))]
        self._tiles = np.stack([tiles(sheet.crop((x, y, x + side, y + side))) for x, y in boxes])

    @property
    def prompts(self) -> list[str]:
        """The twenty prompts; the position of a prompt is its seed."""
        return [*self.trained, *self.held_out]

    def nearest(self, image: Image.Image) -> str:
        """Name of the candidate that is most similar to the image."""
        distances = ((self._tiles - tiles(image)) ** 2).sum(axis=(1, 2, 3))
        return self.names[int(distances.argmin())]


def tiles(image: Image.Image) -> NDArray[np.float64]:
    """Mean colors of a grid over the image, (GRID, GRID, 3) in [0, 1]."""
    return np.asarray(image.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64) / 255


@pytest.fixture(scope="module")
def references() -> References:
    """The committed reference sheet."""
    return References()


@pytest.fixture(scope="module")
def draw() -> Iterator[Draw]:
    """Generate an image with the stages in this process and the checkpoint's defaults."""
    torch.set_num_threads(2)
    fleet = open_fleet(DEFAULT_MODEL)
    yield lambda prompt, seed: fleet.images(prompt=prompt, seed=seed)[0]
    fleet.close()


@pytest.fixture(scope="module")
def images(draw: Draw, references: References) -> dict[str, Image.Image]:
    """One image for each prompt."""
    return {prompt: draw(prompt, seed) for seed, prompt in enumerate(references.prompts)}


def test_half_of_the_twenty_prompts_are_held_out(references: References) -> None:
    assert len(references.trained) == len(references.held_out) == 10
    assert len(set(references.names)) == len(references.names) >= 50


def test_images_are_recognized_as_their_prompts(images: dict[str, Image.Image], references: References) -> None:
    recognized = {prompt: references.nearest(image) for prompt, image in images.items()}
    missed = {prompt: name for prompt, name in recognized.items() if prompt != name}
    assert len(missed) <= 0.3 * len(recognized), missed
    missed_held_out = {prompt: name for prompt, name in missed.items() if prompt in references.held_out}
    assert len(missed_held_out) <= 0.3 * len(references.held_out), missed_held_out


def test_images_are_not_recognized_under_shuffled_prompts(
    images: dict[str, Image.Image], references: References
) -> None:
    shuffled = random.Random(0).sample(references.prompts, len(references.prompts))
    hits = [references.nearest(images[prompt]) == other for prompt, other in zip(images, shuffled, strict=True)]
    assert sum(hits) <= 0.1 * len(hits)


def test_noise_is_not_recognized(references: References) -> None:
    """Negative control of the similarity measure."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in references.prompts]
    hits = [references.nearest(image) == prompt for image, prompt in zip(noise, references.prompts, strict=True)]
    assert sum(hits) <= 0.1 * len(hits)


def test_the_seed_determines_the_image(draw: Draw, images: dict[str, Image.Image]) -> None:
    same, other = draw("a cat", 0), draw("a cat", 1)
    assert same.tobytes() == images["a cat"].tobytes()
    assert other.tobytes() != same.tobytes()


def test_diffusers_generates_the_same_images_from_the_same_directory(
    images: dict[str, Image.Image], references: References
) -> None:
    model = open_model(DEFAULT_MODEL, load_registry())
    pipeline = FluxPipeline.from_pretrained(model.checkpoint.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in ("a cat", "a blue apple", "a pink elephant"):
        theirs = pipeline(
            prompt,
            height=128,
            width=128,
            num_inference_steps=20,
            max_sequence_length=64,
            generator=torch.Generator("cpu").manual_seed(references.prompts.index(prompt)),
        ).images[0]
        difference = np.abs(np.asarray(theirs, dtype=int) - np.asarray(images[prompt], dtype=int))
        assert difference.max() <= 1, f"{prompt}: pixels differ by up to {difference.max()} of 255"
