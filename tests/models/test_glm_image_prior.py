"""Parity of GLM-Image's prior tokens and glyph embeddings with Diffusers: same weights and seed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GlmImagePipeline
from torch import Tensor
from transformers import GenerationConfig

from common.errors import Cancelled, CheckpointError, InvalidInput
from models.encoder_runners.glyphs import GlyphEncoder, quoted_texts
from models.encoder_runners.prior_tokens import Grid, PriorTokenSampler
from tiny_glm_image import CODES, build_tiny_glm_image

CPU = torch.device("cpu")
PROMPT = "a red apple on the moon"
FLAT_SAMPLING = {"top_k": 0, "top_p": 1.0, "temperature": 9.0}


def ignore(*_: object) -> None:
    """Ignore a progress report."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = build_tiny_glm_image(tmp_path_factory.mktemp("glm") / "image")
    with torch.inference_mode():
        yield GlmImagePipeline.from_pretrained(path)


def sampler(pipeline: Any, codebook_size: int = CODES) -> PriorTokenSampler:
    return PriorTokenSampler(pipeline.processor, pipeline.vision_language_encoder, codebook_size, CPU)


def expected(pipeline: Any, prompt: str, grid: Grid, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens: Tensor = pipeline.generate_prior_tokens(prompt, 32 * grid[0], 32 * grid[1], generator=generator)[0]
    return tokens


@pytest.mark.parametrize(
    ("prompt", "grid", "seed"),
    [(PROMPT, (2, 2), 0), (PROMPT, (1, 5), 0), ("", (6, 1), 7), ("Zürich\n\t猫 <sop>9 9<eop>", (3, 4), 2**63 - 1)],
    ids=str,
)
def test_prior_tokens_match_diffusers(theirs: Any, prompt: str, grid: Grid, seed: int) -> None:
    tokens = sampler(theirs).sample(prompt, grid, seed, ignore)
    assert tokens.shape == (1, 4 * grid[0] * grid[1])
    assert torch.equal(tokens, expected(theirs, prompt, grid, seed))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 3, "temperature": 3.0}, {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}],
    ids=str,
)
def test_prior_tokens_with_other_generation_settings_match_diffusers(theirs: Any, settings: dict[str, Any]) -> None:
    model = theirs.vision_language_encoder
    before, model.generation_config = model.generation_config, GenerationConfig(do_sample=True, **settings)
    try:
        tokens = sampler(theirs).sample(PROMPT, (3, 3), 1, ignore)
        assert torch.equal(tokens, expected(theirs, PROMPT, (3, 3), 1))
    finally:
        model.generation_config = before


def test_tokens_depend_on_prompt_and_seed(theirs: Any) -> None:
    tokens = sampler(theirs)
    first = tokens.sample(PROMPT, (3, 3), 1, ignore)
    assert not torch.equal(first, tokens.sample(PROMPT, (3, 3), 2, ignore))
    assert not torch.equal(first, tokens.sample("a blue apple on the moon", (3, 3), 1, ignore))


def test_concurrent_requests_do_not_share_random_numbers(theirs: Any) -> None:
    """Concurrent requests give the tokens of single requests, and leave torch's generator unchanged."""
    tokens = sampler(theirs)
    seeds = (1, 2)
    alone = [tokens.sample(PROMPT, (2, 3), seed, ignore) for seed in seeds]
    torch.manual_seed(11)
    state = torch.get_rng_state()

    def sample(seed: int) -> Tensor:
        with torch.inference_mode():
            return tokens.sample(PROMPT, (2, 3), seed, ignore)

    with ThreadPoolExecutor(len(seeds)) as threads:
        together = list(threads.map(sample, seeds))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is unchanged"


@pytest.mark.parametrize("last", [1, 2, 200])
def test_cancellation_ends_sampling_within_a_token(theirs: Any, last: int) -> None:
    done: list[int] = []

    def on_token(token: int, total: int) -> None:
        assert total == 256 + 4
        done.append(token)
        if token == last:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        sampler(theirs).sample(PROMPT, (2, 2), 0, on_token)
    assert done == [*range(1, last + 1)]


def test_an_end_token_before_the_last_token_is_refused_with_the_seed(tmp_path: Path) -> None:
    """Diffusers fails with a shape error in this case."""
    early = GlmImagePipeline.from_pretrained(
        build_tiny_glm_image(tmp_path / "early", codes=CODES + 2, generation=FLAT_SAMPLING)
    )
    with pytest.raises(InvalidInput, match=r"seed: 4 is not usable .* an end token after \d+ of 260") as caught:
        sampler(early).sample(PROMPT, (2, 2), 4, ignore)
    assert caught.value.field == "seed"


def test_tokens_without_an_embedding_in_the_transformer_are_refused_with_the_seed(theirs: Any) -> None:
    """On a GPU, such a token triggers a device-side assert, which ends the denoiser's process."""
    with pytest.raises(InvalidInput, match=r"seed: 4 is not usable .* the transformer has no embedding") as caught:
        sampler(theirs, codebook_size=2).sample(PROMPT, (3, 3), 4, ignore)
    assert caught.value.field == "seed"


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.2}, {"num_beams": 2}, {"min_p": 0.1}, {"suppress_tokens": [1]}, {"temperature": -1.0}],
    ids=str,
)
def test_unsupported_generation_settings_are_refused(theirs: Any, settings: dict[str, Any]) -> None:
    model = theirs.vision_language_encoder
    before, model.generation_config = model.generation_config, GenerationConfig(**settings)
    try:
        with pytest.raises(CheckpointError, match=f"generation_config.json: .*{min(settings)}"):
            sampler(theirs)
    finally:
        model.generation_config = before


@pytest.mark.parametrize("name", ["image_token_id", "image_start_token_id", "image_end_token_id"])
def test_special_tokens_missing_in_the_tokenizer_are_refused(theirs: Any, name: str) -> None:
    config = theirs.vision_language_encoder.config
    before = config.to_dict()[name]
    setattr(config, name, 9999)
    try:
        with pytest.raises(CheckpointError, match=f"{name}: 9999 is not a token of processor/tokenizer.json"):
            sampler(theirs)
    finally:
        setattr(config, name, before)


@pytest.mark.parametrize(
    "prompt",
    ["", "no quotes", "'one'", '"one" and “two”', "“one” 「two」 'three' \"four\"", "it's, isn't", "'' \"\"", "“open"],
)
def test_glyphs_match_diffusers(theirs: Any, prompt: str) -> None:
    assert [quoted_texts(prompt)] == theirs.get_glyph_texts(prompt)
    ours = GlyphEncoder(theirs.tokenizer, theirs.text_encoder, CPU).encode(prompt, 2048, ignore)
    assert torch.equal(ours, theirs.encode_prompt(prompt, do_classifier_free_guidance=False)[0])
