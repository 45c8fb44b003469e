"""Reading a checkpoint without torch; the errors of a broken checkpoint name the file and the defect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bare_checkpoint import FLUX_MODULES, build_bare_flux, safetensors_bytes
from common.checkpoint import Checkpoint
from common.errors import CheckpointError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return build_bare_flux(tmp_path / "flux")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(dtype: str = "F32", shape: object = (1,), begin: int = 0, end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_open_reads_modules_configs_and_weight_headers(flux: Path) -> None:
    checkpoint = Checkpoint.open(flux)
    assert checkpoint.name == "flux"
    assert checkpoint.path == flux
    assert checkpoint.pipeline_name == "FluxPipeline"
    assert checkpoint.modules == {name: tuple(entry) for name, entry in FLUX_MODULES.items()}
    assert checkpoint.module_config("vae")["block_out_channels"] == [8, 8, 8, 8]
    assert checkpoint.module_config("tokenizer") == {"model_max_length": 77}
    assert checkpoint.weight_files("scheduler") == ()
    assert checkpoint.weight_files("transformer") == (flux / WEIGHTS,)
    (header,) = checkpoint.weight_headers("transformer").values()
    assert {name: info.shape for name, info in header.tensors.items()} == {"weight": (5,), "bias": (1,)}
    assert checkpoint.sampling_defaults == {}


def test_null_entries_and_settings_are_not_modules(flux: Path) -> None:
    edit_json(flux / "model_index.json", image_encoder=[None, None], boundary_ratio=0.9, expand_timesteps=False)
    checkpoint = Checkpoint.open(flux)
    assert "image_encoder" not in checkpoint.modules
    assert checkpoint.index["boundary_ratio"] == 0.9


def test_an_unknown_module_is_refused_with_the_known_names(flux: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no module 'unet'; it has scheduler, text_encoder"):
        Checkpoint.open(flux).module_config("unet")


def test_sampling_defaults_retain_their_types(tmp_path: Path) -> None:
    defaults = {"height": 64, "guidance_scale": 2.5, "prompt_2": "x", "flag": True, "sigmas": [1, 0.5]}
    checkpoint = Checkpoint.open(build_bare_flux(tmp_path / "flux", sampling_defaults=defaults))
    assert checkpoint.sampling_defaults == {**defaults, "sigmas": (1.0, 0.5)}
    assert type(checkpoint.sampling_defaults["height"]) is int


def test_shards_are_found_through_their_index(flux: Path) -> None:
    folder = flux / "transformer"
    (flux / WEIGHTS).unlink()
    for shard, name in (("b.safetensors", "weight"), ("a.safetensors", "bias")):
        (folder / shard).write_bytes(safetensors_bytes({name: [0.0]}))
    weight_map = {"weight": "b.safetensors", "bias": "a.safetensors"}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint.open(flux).weight_files("transformer") == (folder / "a.safetensors", folder / "b.safetensors")

    index.write_text(json.dumps({"weight_map": {**weight_map, "scale": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"assigns scale to a.safetensors, which does not contain it"):
        Checkpoint.open(flux)
    index.write_text(json.dumps({"weight_map": {"weight": "../vae/config.json"}}))
    with pytest.raises(CheckpointError, match="is not a file name; write it without directories"):
        Checkpoint.open(flux)
    (folder / "b.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"names b.safetensors, which is missing"):
        Checkpoint.open(flux)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(flux)


BROKEN_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such directory": (shutil.rmtree, "is not a directory"),
    "no index": (lambda path: (path / "model_index.json").unlink(), "has no model_index.json"),
    "index is not JSON": (lambda path: (path / "model_index.json").write_text("{"), "is not valid JSON"),
    "index is not UTF-8": (lambda path: (path / "model_index.json").write_bytes(b'{"a": "\xff"}'), "is not valid JSON"),
    "index is a list": (lambda path: (path / "model_index.json").write_text("[]"), "a JSON value of type list is not"),
    "deep nesting": (lambda path: (path / "model_index.json").write_text("[" * 100_000), "is not valid JSON"),
    "no class": (lambda path: (path / "model_index.json").write_text("{}"), "has no _class_name"),
    "module without folder": (lambda path: shutil.rmtree(path / "vae"), "lacks the directory vae/"),
    "module entry without a class": (
        lambda path: edit_json(path / "model_index.json", vae=["diffusers"]),
        "library, class",
    ),
    "module outside the checkpoint": (
        lambda path: edit_json(path / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]}),
        r"module '\.\./vae' is not a valid directory name",
    ),
    "no config": (lambda path: (path / "vae/config.json").unlink(), r"vae lacks config\.json"),
    "broken config": (lambda path: (path / "vae/config.json").write_text("nul"), r"vae/config\.json is not valid JSON"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), "contains no weights"),
    "defaults are not JSON": (lambda path: (path / "sampling_defaults.json").write_text("x"), "is not valid JSON"),
    "default of null": (
        lambda path: (path / "sampling_defaults.json").write_text('{"height": null}'),
        "height: null is not a number",
    ),
}


@pytest.mark.parametrize("case", BROKEN_DIRECTORIES)
def test_a_broken_directory_is_refused(flux: Path, case: str) -> None:
    spoil, message = BROKEN_DIRECTORIES[case]
    spoil(flux)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(flux)


BROKEN_WEIGHTS = {
    "empty": (b"", "is not a complete safetensors file"),
    "header longer than the file": ((2**40).to_bytes(8, "little") + b"{}", "is not a complete safetensors file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "header is not JSON": ((2).to_bytes(8, "little") + b"{x", "header that is not JSON"),
    "header is a list": (with_header([]), "not a JSON object"),
    "entry without offsets": (with_header({"w": {"dtype": "F32", "shape": []}}), "entry of w lacks"),
    "unknown dtype": (
        with_header({"w": tensor(dtype="F33")}, bytes(4)),
        "w has the unknown dtype 'F33'; known dtypes are",
    ),
    "negative extent": (with_header({"w": tensor(shape=[-1, -1])}, bytes(4)), "invalid shape"),
    "shape and bytes disagree": (with_header({"w": tensor(shape=[2])}, bytes(4)), "does not have 4 bytes"),
    "gap": (with_header({"w": tensor(begin=4, end=8)}, bytes(8)), "starts at byte 4 of the data instead of byte 0"),
    "overlap": (
        with_header({"v": tensor(), "w": tensor()}, bytes(4)),
        "starts at byte 0 of the data instead of byte 4",
    ),
    "truncated": (safetensors_bytes({"w": [0.0] * 9})[:-1], "is truncated: its header describes"),
    "trailing bytes": (safetensors_bytes({"w": [0.0]}) + b"\0", "is too long"),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_weights_are_refused(flux: Path, case: str) -> None:
    data, message = BROKEN_WEIGHTS[case]
    (flux / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Checkpoint.open(flux)
    assert WEIGHTS in str(refusal.value)


def test_the_fingerprint_covers_weights_and_configs_but_not_defaults_or_readmes(flux: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(flux).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(flux, copy)
    (copy / "sampling_defaults.json").write_text('{"height": 64}')
    (copy / "README.md").write_text("read me")
    (copy / "vae/README.md").write_text("read me")
    assert Checkpoint.open(copy).fingerprint == original

    for file in (WEIGHTS, "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.rmtree(copy)
        shutil.copytree(flux, copy)
        data = (copy / file).read_bytes()
        (copy / file).write_bytes(data[:-1] + b"\x01" if file == WEIGHTS else data + b" ")
        assert Checkpoint.open(copy).fingerprint != original, file


def test_the_fingerprint_depends_on_every_tensor_of_a_large_file(flux: Path) -> None:
    tensors = {f"block.{i}": [0.0] * 4096 for i in range(8)}
    data = bytearray(safetensors_bytes(tensors))
    start = len(data) - 8 * 4 * 4096
    fingerprints = set()
    for index in range(-1, 8):
        spoilt = bytearray(data)
        if index >= 0:
            spoilt[start + index * 4 * 4096 + 2 * 4096] = 1
        (flux / WEIGHTS).write_bytes(spoilt)
        fingerprints.add(Checkpoint.open(flux).fingerprint)
    assert len(fingerprints) == 9


@pytest.fixture(scope="module")
def module_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bare_flux(tmp_path_factory.mktemp("module_flux") / "flux")


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_harmless(module_flux: Path, data: st.DataObject) -> None:
    """Damage to one file gives a readable checkpoint or a CheckpointError that names the directory."""
    file = module_flux / data.draw(st.sampled_from(["model_index.json", WEIGHTS, "vae/config.json"]))
    whole = file.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    rest = data.draw(st.sampled_from([whole[:position], whole[position + 1 :]]))
    file.write_bytes(rest + data.draw(st.binary(max_size=12)))
    try:
        assert Checkpoint.open(module_flux).fingerprint
    except CheckpointError as error:
        problem = error.message
    else:
        problem = ""
    finally:
        file.write_bytes(whole)
    assert not problem or str(module_flux) in problem
