"""Damage to a file of a checkpoint is refused with the file's name, or is harmless.

Each file gets each kind of damage in DAMAGES. Families are the `build_tiny_*` functions of tests/tiny_*.py and the
shipped models, so new families are covered.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch

from common.checkpoint import kind_of
from common.errors import CheckpointError
from models.catalog import open_model, shipped_models
from models.loader import load_tokenizer, load_variants
from models.registry import load_registry
from models.runtime import Runtime

TESTS = Path(__file__).parents[1]
SHIPPED = TESTS.parent / "models/checkpoints"
REGISTRY = load_registry()
TEXTS = ["a red apple", "Two old stones, in the river!", ""]


def _families() -> dict[str, Callable[[Path], Path]]:
    """Functions by family that write a checkpoint to a directory and return the directory."""
    families: dict[str, Callable[[Path], Path]] = {}
    for file in sorted(TESTS.glob("tiny_*.py")):
        for name, function in inspect.getmembers(importlib.import_module(file.stem), inspect.isfunction):
            family = name.removeprefix("build_")
            if name.startswith("build_tiny_") and function.__module__ == file.stem:
                families[family] = function
    families |= {name: partial(shutil.copytree, SHIPPED / name) for name in shipped_models()}
    return {**families, "emoji without tokenizer.json": _without_tokenizer_json}


def _without_tokenizer_json(path: Path) -> Path:
    """The emoji model with slow tokenizer files only: vocab.json with merges.txt, and spiece.model."""
    shutil.copytree(SHIPPED / "emoji", path)
    for name in ("tokenizer", "tokenizer_2"):
        (path / name / "tokenizer.json").unlink()
    return path


FAMILIES = _families()

DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "removed": lambda _path, _data: None,
    "emptied": lambda path, _: path.write_bytes(b""),
    "empty object": lambda path, _: path.write_bytes(b"{}"),
    "array": lambda path, _: path.write_bytes(b"[]"),
    "truncated to half": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "dangling link": lambda path, _: path.symlink_to("../../blobs/0123"),
}

HARMLESS = {
    # (family, file, damage) as glob patterns: why the damage does not change the model.
    ("*", "README.md", "*"): "is documentation",
    ("*", "sheet.png", "*"): "is documentation",
    ("*", "sampling_defaults.json", "removed"): "is optional; the family's defaults apply",
    ("*", "sampling_defaults.json", "empty object"): "sets no default, as without the file",
    ("tiny_[!gq]*", "*/generation_config.json", "*"): "configures text generation, which an encoder does not use",
    ("tiny_qwen*[!d]", "*/generation_config.json", "*"): "configures text generation, which an encoder does not use",
    ("tiny_qwen*layered", "*/generation_config.json", "removed"): "leaves all settings at their defaults",
    ("tiny_qwen*layered", "*/generation_config.json", "empty object"): "leaves all settings at their defaults",
    ("tiny_glm*", "*/generation_config.json", "empty object"): "leaves all settings at their defaults, as in Diffusers",
    ("tiny_glm*", "tokenizer/added_tokens.json", "removed"): "tokenizer_config.json holds the same tokens",
    ("tiny_glm*", "tokenizer/added_tokens.json", "empty object"): "tokenizer_config.json holds the same tokens",
    ("tiny_z_image", "tokenizer/chat_template.jinja", "*"): "is not read: the pipeline's template is fixed",
    (
        "tiny_qwen*",
        "processor/tokenizer*.json",
        "*",
    ): "belongs to the processor's tokenizer, which is not used; the tokenizer is a separate module",
    ("tiny_flux2*", "tokenizer/chat_template.jinja", "*"): "is not read: the config holds the chat text of a prompt",
    (
        "tiny_flux2_dev",
        "tokenizer/*processor_config.json",
        "removed",
    ): "configures images, which the encoder does not get",
    (
        "tiny_flux2_dev",
        "tokenizer/*processor_config.json",
        "empty object",
    ): "configures images, which the encoder does not get",
    ("emoji*", "tokenizer/tokenizer.json", "removed"): "vocab.json and merges.txt hold the same vocabulary",
    ("emoji*", "tokenizer_2/tokenizer.json", "removed"): "spiece.model holds the same vocabulary",
    ("emoji-video", "tokenizer/tokenizer.json", "removed"): "spiece.model holds the same vocabulary",
    ("emoji*", "tokenizer/vocab.json", "*"): "is not read if tokenizer.json exists",
    ("emoji*", "tokenizer/merges.txt", "*"): "is not read if tokenizer.json exists",
    ("emoji*", "tokenizer*/spiece.model", "*"): "is not read if tokenizer.json exists",
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A family's checkpoint, and a copy that consists of hard links; both are built once."""
    built: dict[str, tuple[Path, Path]] = {}

    def build(family: str) -> tuple[Path, Path]:
        if family not in built:
            root = tmp_path_factory.mktemp("whole")
            whole = FAMILIES[family](root / "whole")
            built[family] = whole, shutil.copytree(whole, root / "damaged", copy_function=os.link)
        return built[family]

    return build


@contextmanager
def damaged(whole: Path, copy: Path, file: Path, damage: str) -> Iterator[None]:
    """Damage one file of the copy. The hard link is replaced, so that the original stays intact."""
    path = copy / file
    path.unlink()
    DAMAGES[damage](path, (whole / file).read_bytes())
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.link(whole / file, path)


def refusal(path: Path, folder: str) -> str:
    """The error message when the model is opened or a service loads the module; "" without an error.

    A service loads the module for every variant of the model that uses the service.
    """
    try:
        model = open_model(str(path), REGISTRY)
        for service in model.services:
            if folder in service.modules:
                load_variants(model, service, Runtime(device=torch.device("cpu"), dtype=torch.float32))
    except CheckpointError as error:
        return error.message
    return ""


def is_harmless(family: str, file: Path, damage: str) -> bool:
    return any(
        fnmatch(family, families) and fnmatch(str(file), files) and fnmatch(damage, damages)
        for families, files, damages in HARMLESS
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_damage_is_refused_or_harmless(
    checkpoint_of: Callable[[str], tuple[Path, Path]], family: str, damage: str
) -> None:
    whole, copy = checkpoint_of(family)
    failures: dict[str, str] = {}
    for path in sorted(whole.rglob("*.*")):
        file = path.relative_to(whole)
        with damaged(whole, copy, file, damage):
            message = refusal(copy, file.parts[0])
        if message and file.name not in message:
            failures[str(file)] = f"is refused without the file's name: {message}"
        elif not message and not is_harmless(family, file, damage):
            failures[str(file)] = "is accepted"
    assert not failures


def test_every_harmless_entry_matches_a_file(checkpoint_of: Callable[[str], tuple[Path, Path]]) -> None:
    files = [
        (family, path.relative_to(whole))
        for family in FAMILIES
        for whole in [checkpoint_of(family)[0]]
        for path in whole.rglob("*.*")
    ]
    for families, pattern, _ in HARMLESS:
        assert any(fnmatch(family, families) and fnmatch(str(file), pattern) for family, file in files), pattern


@pytest.mark.parametrize("model", shipped_models())
def test_tokenizers_without_tokenizer_json_give_the_same_tokens(tmp_path: Path, model: str) -> None:
    path = shutil.copytree(SHIPPED / model, tmp_path / model)
    for name, (library, class_name) in open_model(str(path), REGISTRY).checkpoint.modules.items():
        if kind_of(class_name) == "Tokenizer":
            load = vars(importlib.import_module(library))[class_name].from_pretrained
            whole = load(path / name)(TEXTS).input_ids
            (path / name / "tokenizer.json").unlink()
            assert load(path / name)(TEXTS).input_ids == whole


def write_slow_files(tokenizer: Path) -> None:
    """Replace tokenizer.json by the slow files of byte-level BPE: vocabulary and merges."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tokenizer / "tokenizer.json").unlink()


def test_byte_level_bpe_without_tokenizer_json_gives_the_same_tokens(
    checkpoint_of: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Covers each Qwen2 and CLIP tokenizer, such as HunyuanVideo's tokenizer_2. The shipped models cover T5."""
    checked: set[str] = set()
    for family in FAMILIES:
        whole, _ = checkpoint_of(family)
        modules = open_model(str(whole), REGISTRY).checkpoint.modules
        for name, (_, class_name) in modules.items():
            if class_name not in ("CLIPTokenizer", "Qwen2Tokenizer") or not (whole / name / "tokenizer.json").is_file():
                continue
            path = shutil.copytree(whole, tmp_path / f"{family} {name}")
            tokens = load_tokenizer(open_model(str(path), REGISTRY).checkpoint, name)(TEXTS).input_ids
            write_slow_files(path / name)
            assert load_tokenizer(open_model(str(path), REGISTRY).checkpoint, name)(TEXTS).input_ids == tokens, family
            checked.add(family)
    assert checked >= {
        "tiny_flux2_klein",
        "tiny_hunyuan_video",
        "tiny_qwen_image",
        "tiny_qwen_image_layered",
        "tiny_z_image",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_undamaged_checkpoint_is_accepted(
    checkpoint_of: Callable[[str], tuple[Path, Path]], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = checkpoint_of(family)
    model = open_model(str(whole), REGISTRY)
    assert not model.unserved
    assert [refusal(whole, module) for module in model.checkpoint.modules] == [""] * len(model.checkpoint.modules)
    assert not [each for each in caplog.messages if "unknown config entries" in each]
