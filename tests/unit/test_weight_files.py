"""Safetensors files are found under the names of Diffusers and transformers. Plain files are preferred."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bare_checkpoint import build_bare_flux, safetensors_bytes
from common.checkpoint import Checkpoint
from common.errors import CheckpointError

STEM = "diffusion_pytorch_model"


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A checkpoint whose transformer has no weights yet."""
    path = build_bare_flux(tmp_path / "flux")
    (path / f"transformer/{STEM}.safetensors").unlink()
    return path


def put(folder: Path, *names: str) -> None:
    """Write weight files of one tensor each."""
    for name in names:
        (folder / name).write_bytes(safetensors_bytes({"weight": [0.0]}))


def put_index(folder: Path, name: str, *shards: str) -> None:
    """Write shards of one tensor each, and their index."""
    weight_map = {f"weight_{number}": shard for number, shard in enumerate(shards)}
    for tensor, shard in weight_map.items():
        (folder / shard).write_bytes(safetensors_bytes({tensor: [0.0]}))
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def found(path: Path, module: str = "transformer") -> tuple[str | None, list[str]]:
    """The variant and the files that are read."""
    checkpoint = Checkpoint.open(path)
    return checkpoint.weight_variant(module), [file.name for file in checkpoint.weight_files(module)]


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp32", "ema"])
def test_a_variant_is_read_where_there_is_no_plain_file(flux: Path, variant: str) -> None:
    put(flux / "transformer", f"{STEM}.{variant}.safetensors")
    assert found(flux) == (variant, [f"{STEM}.{variant}.safetensors"])


def test_a_variant_of_transformers_is_read(flux: Path) -> None:
    put(flux / "transformer", f"{STEM}.safetensors")
    (flux / "text_encoder/model.safetensors").rename(flux / "text_encoder/model.fp16.safetensors")
    assert found(flux, "text_encoder") == ("fp16", ["model.fp16.safetensors"])


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000%d-of-00002.safetensors"),
        (f"{STEM}.safetensors.index.fp16.json", f"{STEM}-0000%d-of-00002.fp16.safetensors"),
        (f"{STEM}.safetensors.fp16.index.json", f"{STEM}-0000%d-of-00002.fp16.safetensors"),
    ],
)
def test_shards_of_a_variant_are_read(flux: Path, index: str, shards: str) -> None:
    names = [shards % 1, shards % 2]
    put_index(flux / "transformer", index, *names)
    assert found(flux) == ("fp16", names)


def test_plain_weights_are_preferred(flux: Path) -> None:
    put(flux / "transformer", f"{STEM}.fp16.safetensors")
    put_index(flux / "transformer", f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00001.safetensors")
    assert found(flux) == (None, [f"{STEM}-00001-of-00001.safetensors"])


def test_the_variant_with_the_widest_range_is_read(flux: Path) -> None:
    put(flux / "transformer", *(f"{STEM}.{variant}.safetensors" for variant in ("ema", "fp16", "bf16")))
    assert found(flux)[0] == "bf16"


def test_variants_without_a_rule_are_refused_by_name(flux: Path) -> None:
    put(flux / "transformer", f"{STEM}.ema.safetensors", f"{STEM}.non_ema.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer contains the variants ema, non_ema and no weights"):
        Checkpoint.open(flux)


def test_the_preference_of_the_library_decides_between_shards_and_a_plain_file(flux: Path) -> None:
    for module, stem in (("transformer", STEM), ("text_encoder", "model")):
        put(flux / module, f"{stem}.safetensors")
        put_index(flux / module, f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors")
    assert found(flux)[1] == [f"{STEM}-00001-of-00001.safetensors"]
    assert found(flux, "text_encoder")[1] == ["model.safetensors"]


def test_a_dangling_link_is_named_with_its_target(flux: Path) -> None:
    link = flux / f"transformer/{STEM}.safetensors"
    put(flux / "transformer", f"{STEM}.fp16.safetensors")
    link.symlink_to("../../../blobs/abc")
    with pytest.raises(CheckpointError, match=rf"{link} is a link to \.\./\.\./\.\./blobs/abc, which does not exist"):
        Checkpoint.open(flux)


def test_a_shard_that_is_a_dangling_link_is_named_with_its_target(flux: Path) -> None:
    shard = flux / f"transformer/{STEM}-00001-of-00001.safetensors"
    put_index(flux / "transformer", f"{STEM}.safetensors.index.json", shard.name)
    shard.unlink()
    shard.symlink_to("/nonesuch/blob")
    with pytest.raises(CheckpointError, match=rf"{shard.name} is a link to /nonesuch/blob, which does not exist"):
        Checkpoint.open(flux)


def test_a_dangling_link_of_an_unread_variant_is_ignored(flux: Path) -> None:
    put(flux / "transformer", f"{STEM}.safetensors")
    (flux / f"transformer/{STEM}.fp16.safetensors").symlink_to("/nonesuch/blob")
    assert found(flux) == (None, [f"{STEM}.safetensors"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (f"{STEM}.bin", rf"contains only pickled weights \({STEM}\.bin\).*{STEM}\.safetensors .*is required"),
        (f"{STEM}.fp16.bin", r"contains only pickled weights"),
        ("weights.safetensors", r"contains no weights; weights\.safetensors has another name"),
        ("flux-q4.gguf", r"contains no weights; flux-q4\.gguf has another name"),
        (f"{STEM}-00001-of-00002.safetensors", r"contains no weights; .*-00001-of-00002\.safetensors has another name"),
    ],
)
def test_files_of_another_format_or_name_are_refused_by_name(flux: Path, file: str, message: str) -> None:
    put(flux / "transformer", file)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(flux)


def test_the_fingerprint_covers_the_files_that_are_read_and_no_others(flux: Path, tmp_path: Path) -> None:
    folder = flux / "transformer"
    put(folder, f"{STEM}.fp16.safetensors")
    original = Checkpoint.open(flux).fingerprint
    for unread in (f"{STEM}.ema.safetensors", f"{STEM}.bin", "flux.gguf"):
        put(folder, unread)
    (folder / f"{STEM}.bin.index.json").write_text("{}")
    assert Checkpoint.open(flux).fingerprint == original

    changed = shutil.copytree(flux, tmp_path / "changed")
    read = changed / f"transformer/{STEM}.fp16.safetensors"
    read.write_bytes(read.read_bytes()[:-1] + b"\x01")
    assert Checkpoint.open(changed).fingerprint != original
