"""Tokenizer files hold a complete vocabulary that fits the encoder; the check does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bare_checkpoint import build_bare_flux
from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from common.vocabulary import Vocabulary, read_vocabulary
from models.catalog import shipped_models

SHIPPED = Path(__file__).parents[2] / "models/checkpoints"
# Three characters, and the tokens of two merges.
VOCAB = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
MERGES = "#version: 0.2\na b\nab c\n"
BPE: dict[str, Any] = {"type": "BPE", "vocab": VOCAB, "merges": ["a b", ["ab", "c"]]}
UNIGRAM: dict[str, Any] = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1]]}


def write_files(folder: Path, **files: object) -> Path:
    """Write files; `__` in a keyword stands for the dot of a name."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else str(content).encode()
        data = json.dumps(content).encode() if isinstance(content, dict | list) else data
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def tokenizer(model: object, *added: tuple[str, int]) -> dict[str, object]:
    return {"added_tokens": [{"content": content, "id": number} for content, number in added], "model": model}


def test_a_tokenizer_json_is_read_with_its_added_tokens(tmp_path: Path) -> None:
    path = write_files(tmp_path, tokenizer__json=tokenizer(BPE, ("<end>", 9))) / "tokenizer.json"
    assert read_vocabulary(tmp_path, "CLIPTokenizerFast") == Vocabulary(path, 10)
    write_files(tmp_path, tokenizer__json=tokenizer(UNIGRAM, ("<unk>", 0)))
    assert read_vocabulary(tmp_path, "T5Tokenizer") == Vocabulary(path, 2)


def test_files_of_the_class_are_read_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    write_files(tmp_path, vocab__json=VOCAB, merges__txt=MERGES)
    assert read_vocabulary(tmp_path, "Qwen2Tokenizer") == Vocabulary(tmp_path / "vocab.json", 5)


def test_a_tokenizer_class_with_unknown_files_has_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path, "ByT5Tokenizer") is None


@pytest.mark.parametrize("model", shipped_models())
def test_every_file_of_a_shipped_tokenizer_gives_the_same_size(model: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(SHIPPED / model)
    for name, (_, class_name) in checkpoint.modules.items():
        complete = read_vocabulary(checkpoint.path / name, class_name)
        if complete is not None:
            others = tmp_path / name
            others.mkdir()
            for file in (checkpoint.path / name).iterdir():
                if file.name != "tokenizer.json":
                    (others / file.name).symlink_to(file)
            again = read_vocabulary(others, class_name)
            assert again is not None
            assert again.size == complete.size


BROKEN: dict[str, tuple[str, dict[str, object], str]] = {
    "no files": (
        "CLIPTokenizer",
        {},
        r"lacks vocab\.json and merges\.txt: CLIPTokenizer is built from tokenizer\.json",
    ),
    "no merges": ("Qwen2Tokenizer", {"vocab__json": VOCAB}, r"lacks merges\.txt"),
    "no sentencepiece": ("T5TokenizerFast", {}, r"lacks spiece\.model: T5TokenizerFast is built from"),
    "files of another class": ("T5Tokenizer", {"vocab__json": VOCAB, "merges__txt": MERGES}, r"lacks spiece\.model"),
    "empty object": ("T5Tokenizer", {"tokenizer__json": {}}, r"tokenizer\.json lacks model or added_tokens"),
    "no vocabulary": ("T5Tokenizer", {"tokenizer__json": tokenizer({})}, r"tokenizer\.json lacks model\.vocab"),
    "empty vocabulary": (
        "T5Tokenizer",
        {"tokenizer__json": tokenizer({"vocab": []})},
        r"tokenizer\.json contains no vocabulary besides special tokens",
    ),
    "special tokens alone": (
        "T5Tokenizer",
        {"tokenizer__json": tokenizer({"vocab": [["<pad>", 0]]}, ("<pad>", 0))},
        r"contains no vocabulary besides special tokens",
    ),
    "entry without score": (
        "T5Tokenizer",
        {"tokenizer__json": tokenizer({"vocab": [["a"]]})},
        r"entry 0 of model\.vocab",
    ),
    "id that is not a number": (
        "CLIPTokenizer",
        {"tokenizer__json": tokenizer({"vocab": {"a": "0"}})},
        r"'a' has the id '0'",
    ),
    "added token without id": (
        "CLIPTokenizer",
        {"tokenizer__json": {"added_tokens": [{"content": "x"}], "model": BPE}},
        r"an entry of added_tokens lacks content or id",
    ),
    "merges are missing": (
        "CLIPTokenizer",
        {"tokenizer__json": tokenizer({**BPE, "merges": []})},
        r"tokenizer\.json holds 0 merges, too few for a vocabulary of 5 tokens",
    ),
    "merges.txt is empty": ("CLIPTokenizer", {"vocab__json": VOCAB, "merges__txt": ""}, r"merges\.txt holds 0 merges"),
    "merges.txt lacks its end": (
        "CLIPTokenizer",
        {"vocab__json": {**VOCAB, **{f"<{i}>": i for i in range(5, 2000)}}, "merges__txt": MERGES},
        r"merges\.txt holds 2 merges, too few for a vocabulary of 2000 tokens",
    ),
    "merge is truncated": (
        "CLIPTokenizer",
        {"vocab__json": VOCAB, "merges__txt": "a b\nab"},
        r"merges\.txt: merge 'ab' produces no token",
    ),
    "vocab.json is empty": (
        "CLIPTokenizer",
        {"vocab__json": {}, "merges__txt": MERGES},
        r"vocab\.json contains no vocab",
    ),
    "spiece.model is empty": ("T5Tokenizer", {"spiece__model": b""}, r"spiece\.model contains no vocabulary"),
    "spiece.model is text": (
        "T5Tokenizer",
        {"spiece__model": b"version https://git-lfs"},
        r"not a complete sentencepiece",
    ),
    "spiece.model is truncated": (
        "T5Tokenizer",
        {"spiece__model": b"\x0a\x08\x0a\x01a"},
        r"not a complete sentencepiece",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_vocabulary_is_refused(tmp_path: Path, case: str) -> None:
    class_name, files, message = BROKEN[case]
    write_files(tmp_path, **files)
    with pytest.raises(CheckpointError, match=message) as refused:
        read_vocabulary(tmp_path, class_name)
    assert str(tmp_path) in refused.value.message


@pytest.mark.parametrize(
    "config_of", [lambda size: {"vocab_size": size}, lambda size: {"text_config": {"vocab_size": size}}]
)
@pytest.mark.parametrize(("size", "fits"), [(2, False), (3, True), (99, True)])
def test_a_tokenizer_may_be_smaller_than_its_encoder_but_not_larger(
    tmp_path: Path, config_of: Callable[[int], dict[str, object]], size: int, fits: bool
) -> None:
    path = build_bare_flux(tmp_path / "flux")
    (path / "text_encoder/config.json").write_text(json.dumps(config_of(size)))
    if fits:
        Checkpoint.open(path)
    else:
        with pytest.raises(CheckpointError, match=r"tokenizer has 3 tokens, but text_encoder has embeddings for 2"):
            Checkpoint.open(path)
