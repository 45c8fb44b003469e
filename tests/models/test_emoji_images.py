"""The emoji model draws what it is asked for, also where it never saw noun and colour together.

Twenty prompts, each under a seed of its own (its position), against 64 candidate pictures: the twenty prompts' own and
44 others, mostly the same nouns in other colours. Similarity has nothing learned in it: both pictures are reduced to
the mean colours of a grid of 16x16 tiles, and the smaller squared distance is the more similar. Guessing scores 1/64.

tests/golden/emoji_references.png was rendered once from the emoji images that the model was trained on (see the model
card), by code that shares nothing with training's: the emoji over white, at 84% of a 128-pixel square; for a colour,
each pixel within some 50 degrees of the emoji's dominant hue (or each pale pixel, where the emoji has no vivid colour)
is turned to the named hue; then averaged down to 32 pixels. The .json beside it names the tiles row by row; its
"held_out" names are the first ten colour-noun pairs of the list that training left out.
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
    """The candidate pictures by name, and which of them are the fixed prompts."""

    def __init__(self) -> None:
        about: dict[str, Any] = json.loads((GOLDEN / "emoji_references.json").read_text())
        self.trained: list[str] = about["trained"]
        self.held_out: list[str] = about["held_out"]
        self.names: list[str] = [*self.trained, *self.held_out, *about["others"]]
        sheet, side, columns = Image.open(GOLDEN / "emoji_references.png"), about["tile"], about["columns"]
        boxes = [(i % columns * side, i // columns * side) for i in range(len(self.names))]
        self._tiles = np.stack([tiles(sheet.crop((x, y, x + side, y + side))) for x, y in boxes])

    @property
    def prompts(self) -> list[str]:
        """The twenty fixed prompts; their positions are their seeds."""
        return [*self.trained, *self.held_out]

    def nearest(self, picture: Image.Image) -> str:
        """The name of the candidate that is most like the picture."""
        distances = ((self._tiles - tiles(picture)) ** 2).sum(axis=(1, 2, 3))
        return self.names[int(distances.argmin())]


def tiles(picture: Image.Image) -> NDArray[np.float64]:
    """Mean colours of a grid over the picture, (GRID, GRID, 3) in [0, 1]."""
    return np.asarray(picture.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64) / 255


@pytest.fixture(scope="module")
def references() -> References:
    """Read the committed sheet once."""
    return References()


@pytest.fixture(scope="module")
def draw() -> Iterator[Draw]:
    """Draw with the fleet's stages, in this process, with the checkpoint's own defaults."""
    torch.set_num_threads(2)
    fleet = open_fleet(DEFAULT_MODEL)
    yield lambda prompt, seed: fleet.images(prompt=prompt, seed=seed)[0]
    fleet.close()


@pytest.fixture(scope="module")
def pictures(draw: Draw, references: References) -> dict[str, Image.Image]:
    """One picture for each of the fixed prompts."""
    return {prompt: draw(prompt, seed) for seed, prompt in enumerate(references.prompts)}


def test_fixed_prompts_are_twenty_of_at_least_fifty_candidates_half_of_them_never_trained(
    references: References,
) -> None:
    assert len(references.trained) == len(references.held_out) == 10
    assert len(set(references.names)) == len(references.names) >= 50


def test_pictures_are_recognised(pictures: dict[str, Image.Image], references: References) -> None:
    seen = {prompt: references.nearest(picture) for prompt, picture in pictures.items()}
    missed = {prompt: name for prompt, name in seen.items() if prompt != name}
    assert len(missed) <= 0.3 * len(seen), missed
    missed_new = {prompt: name for prompt, name in missed.items() if prompt in references.held_out}
    assert len(missed_new) <= 0.3 * len(references.held_out), missed_new


def test_pictures_are_not_recognised_under_shuffled_prompts(
    pictures: dict[str, Image.Image], references: References
) -> None:
    shuffled = random.Random(0).sample(references.prompts, len(references.prompts))
    hits = [references.nearest(pictures[drawn]) == named for drawn, named in zip(pictures, shuffled, strict=True)]
    assert sum(hits) <= 0.1 * len(hits)


def test_noise_is_not_recognised(references: References) -> None:
    """The measure itself: what an untrained model draws must not pass."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)) for _ in references.prompts]
    hits = [references.nearest(picture) == prompt for picture, prompt in zip(noise, references.prompts, strict=True)]
    assert sum(hits) <= 0.1 * len(hits)


def test_the_seed_decides_the_picture(draw: Draw, pictures: dict[str, Image.Image]) -> None:
    again, other = draw("a cat", 0), draw("a cat", 1)
    assert again.tobytes() == pictures["a cat"].tobytes()
    assert other.tobytes() != again.tobytes()


def test_diffusers_draws_the_same_images_from_the_same_directory(
    pictures: dict[str, Image.Image], references: References
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
        difference = np.abs(np.asarray(theirs, dtype=int) - np.asarray(pictures[prompt], dtype=int))
        assert difference.max() <= 1, f"{prompt}: pixels differ by up to {difference.max()} of 255"
