"""Errors describe the content of a path that is not a Diffusers directory. Snapshots are named by repository."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bare_checkpoint import build_bare_flux, safetensors_bytes
from common.errors import CheckpointError
from models.catalog import open_model
from models.registry import load_registry

REPOSITORY = "models--black-forest-labs--FLUX.1-dev"
LORA = safetensors_bytes({"transformer.blocks.0.lora_A.weight": [0.0]})
WEIGHTS = safetensors_bytes({"weight": [0.0]})


def build_snapshot(cache: Path, commit: str = "0a1b2c", repository: str = REPOSITORY) -> Path:
    """Write a repository of the Hugging Face cache, with links as weights. Returns the new snapshot."""
    root = cache / repository
    snapshot = build_bare_flux(root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs/main").write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(snapshot.rglob("*.safetensors"))):
        blob = file.rename(root / "blobs" / f"{commit}-{number}")
        file.symlink_to(os.path.relpath(blob, file.parent))
    return snapshot


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def two_snapshots(path: Path) -> Path:
    return build_snapshot(path, "2222").parents[1] if build_snapshot(path, "1111") else path


def incomplete(path: Path) -> Path:
    snapshot = build_snapshot(path)
    (snapshot / "model_index.json").unlink()
    return snapshot.parents[1]


def cache_of_others(path: Path) -> Path:
    (path / "models--google--t5/snapshots/1").mkdir(parents=True)
    return path


def single_model(path: Path) -> Path:
    write(path / "model.safetensors", WEIGHTS)
    return write(path / "config.json", b'{"architectures": ["T5EncoderModel"]}').parent


ONE_FILE = r"is a single-file checkpoint; .*from_single_file\(.*\)\.save_pretrained\(DIRECTORY\)"
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "safetensors file": (lambda p: write(p / "flux.safetensors", WEIGHTS), rf"flux\.safetensors {ONE_FILE}"),
    "truncated safetensors file": (lambda p: write(p / "flux.safetensors", b"\1"), ONE_FILE),
    "ckpt file": (lambda p: write(p / "v1-5.ckpt", b"x"), rf"v1-5\.ckpt {ONE_FILE}"),
    "gguf file": (lambda p: write(p / "flux-q4.gguf", b"x"), rf"flux-q4\.gguf {ONE_FILE}"),
    "other file": (lambda p: write(p / "notes.txt", b"x"), r"notes\.txt is a file; a model is a Diffusers directory"),
    "directory of one file": (
        lambda p: write(p / "flux.safetensors", WEIGHTS).parent,
        rf"has no model_index\.json, and flux\.safetensors in it {ONE_FILE}",
    ),
    "LoRA file": (lambda p: write(p / "style.safetensors", LORA), r"style\.safetensors contains LoRA weights"),
    "LoRA of Diffusers": (
        lambda p: write(p / "pytorch_lora_weights.safetensors", LORA).parent,
        r"contains LoRA weights \(pytorch_lora_weights\.safetensors\).*fuse_lora",
    ),
    "LoRA of PEFT": (lambda p: write(p / "adapter_config.json", b"{}").parent, r"LoRA weights \(adapter_config\.json"),
    "LoRA under another name": (lambda p: write(p / "style.safetensors", LORA).parent, r"LoRA weights \(style\.safe"),
    "repository of the cache": (
        lambda p: build_snapshot(p).parents[1],
        rf"is a repository in the Hugging Face cache; pass its snapshot .*{REPOSITORY}/snapshots/0a1b2c$",
    ),
    "its snapshots": (lambda p: build_snapshot(p).parent, r"pass its snapshot .*/snapshots/0a1b2c$"),
    "two snapshots": (two_snapshots, r"pass one of its snapshots: .*/snapshots/1111, .*/snapshots/2222$"),
    "incomplete repository": (incomplete, r"none of its snapshots has model_index\.json; download it again"),
    "cache": (
        lambda p: build_snapshot(p).parents[2],
        r"is the Hugging Face cache; pass a snapshot .*/snapshots/0a1b2c$",
    ),
    "directory of the cache": (
        lambda p: build_snapshot(p / "hub").parents[3],
        r"hub is the Hugging Face cache; pass a snapshot in it, such as .*/snapshots/0a1b2c$",
    ),
    "cache of other models": (
        cache_of_others,
        r"no snapshot in it has model_index\.json; it holds models--google--t5$",
    ),
    "one module": (lambda p: build_bare_flux(p) / "vae", r"vae is one module of a checkpoint, which is .*; pass that"),
    "one model": (single_model, r"contains a single model \(T5EncoderModel\) and no pipeline"),
    "empty directory": (
        lambda p: write(p / ".keep", b"").parent,
        r"has no model_index\.json, so it is not a Diffusers directory; ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_the_kind_of_path_and_the_remedy(tmp_path: Path, case: str) -> None:
    build, message = CASES[case]
    with pytest.raises(CheckpointError) as refused:
        open_model(str(build(tmp_path / "given")), load_registry())
    assert re.search(message, refused.value.message), refused.value.message


def test_a_link_to_a_missing_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("/nonesuch/model")
    with pytest.raises(CheckpointError, match=r"model is a link to /nonesuch/model, which does not exist"):
        open_model(str(tmp_path / "model"), load_registry())


def test_a_module_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    path = build_bare_flux(tmp_path / "flux")
    (path / "vae").rename(path / "elsewhere")
    (path / "vae").symlink_to("/nonesuch/vae")
    with pytest.raises(CheckpointError, match=r"flux/vae is a link to /nonesuch/vae, which does not exist"):
        open_model(str(path), load_registry())


@pytest.mark.parametrize("linked", [False, True])
def test_a_snapshot_is_named_by_its_repository(tmp_path: Path, linked: bool) -> None:
    snapshot = build_snapshot(tmp_path)
    if linked:
        (tmp_path / "current").symlink_to(snapshot)
    model = open_model(str(tmp_path / "current" if linked else snapshot), load_registry())
    assert (model.name, model.checkpoint.name) == ("black-forest-labs--FLUX.1-dev",) * 2


def test_a_directory_that_only_looks_like_a_snapshot_has_its_own_name(tmp_path: Path) -> None:
    assert open_model(str(build_bare_flux(tmp_path / "snapshots/mine")), load_registry()).name == "mine"
