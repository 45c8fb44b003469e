"""Tokenizers and image processors that are inconsistent with their encoder are refused at loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast

from common.errors import CheckpointError
from models.catalog import open_model
from models.encoder_runners.checks import check_tokenizer
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from tiny_flux import clip_tokenizer, t5_tokenizer
from tiny_qwen_image import build_tiny_qwen_image_edit, qwen_tokenizer
from tiny_wan import build_tiny_wan_i2v

TOKENIZER_CLASSES = (CLIPTokenizer, Qwen2Tokenizer, T5TokenizerFast)
TOKENIZER_BUILDERS = (clip_tokenizer, qwen_tokenizer, t5_tokenizer)


@pytest.mark.parametrize("tokenizer_class", TOKENIZER_CLASSES)
def test_a_tokenizer_with_an_empty_vocabulary_is_refused(tokenizer_class: type) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer: 'a red apple' is not encoded by any token"):
        check_tokenizer("tokenizer", tokenizer_class(), "text_encoder", 50_000)


@pytest.mark.parametrize("build", TOKENIZER_BUILDERS)
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(build: type) -> None:
    tokenizer = build()
    check_tokenizer("tokenizer", tokenizer, "text_encoder", len(tokenizer))
    message = f"tokenizer: {len(tokenizer)} tokens are not at most {len(tokenizer) - 1}"
    with pytest.raises(CheckpointError, match=message):
        check_tokenizer("tokenizer", tokenizer, "text_encoder", len(tokenizer) - 1)


def test_a_token_id_beyond_the_embedding_is_refused() -> None:
    tokenizer = CLIPTokenizer(vocab={"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 900}, merges=[])
    with pytest.raises(CheckpointError, match="901 tokens are not at most 100, the embeddings of text_encoder"):
        check_tokenizer("tokenizer", tokenizer, "text_encoder", 100)


def load_edited(path: Path, file: str, service: str, **entries: object) -> None:
    """Load a service of a checkpoint after changing entries of one of its JSON files."""
    edited = path / file
    edited.write_text(json.dumps(json.loads(edited.read_text()) | entries))
    model = open_model(str(path), load_registry())
    load_stages(model, model.service(service), Runtime(device=torch.device("cpu"), dtype=torch.float32))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan_i2v(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_qwen_image_edit(tmp_path_factory.mktemp("edit"))


def test_an_image_size_other_than_the_input_size_of_the_vision_encoder_is_refused(wan: Path, tmp_path: Path) -> None:
    path = shutil.copytree(wan, tmp_path / "wan")
    file, crop = "image_processor/preprocessor_config.json", {"height": 112, "width": 112}
    with pytest.raises(
        CheckpointError, match=r"image_processor: 112x112 pixels are not .*, the input size of image_encoder"
    ):
        load_edited(path, file, "image_encoding", crop_size=crop)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"patch_size": 16},
            "patches of 1536 values with a merge size of 2 are not patches of 1176 values",
        ),
        (
            {"merge_size": 1},
            "patches of 1176 values with a merge size of 1 are not patches of 1176 values",
        ),
    ],
)
def test_patches_of_another_size_than_the_vision_tower_reads_are_refused(
    edit_model: Path, tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    path = shutil.copytree(edit_model, tmp_path / "edit")
    with pytest.raises(CheckpointError, match=message):
        load_edited(path, "processor/preprocessor_config.json", "text_encoding", **entries)
