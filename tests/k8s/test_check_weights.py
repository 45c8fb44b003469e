"""The init container's check of weights: an error is one line with the path, and exit status 1."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from manifests import K8S, ROOT

from models.catalog import shipped_models

SCRIPT = K8S / "components" / "weights" / "check_weights.sh"
NOBODY = 65_534
HEADER = b'{"a": {"dtype": "F32", "shape": [2],\n "data_offsets": [0, 8]}, "b": {"data_offsets": [8, 12]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(12)


def check(model: str) -> tuple[int, str]:
    """Run the script; returns exit status and stderr.

    If the test runs as root, the script runs as nobody, because root can read every file.
    """
    done = subprocess.run(
        ["sh"],
        input=SCRIPT.read_text(),
        env=os.environ | {"FLEET_MODEL": model},
        cwd="/",
        user=NOBODY if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def model() -> Iterator[Path]:
    """A model directory that every user may read."""
    parent = Path(tempfile.mkdtemp(prefix="weights-"))
    folder = parent / "a model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "model.safetensors").write_bytes(WHOLE)
    parent.chmod(0o755)
    yield folder
    for path in (folder, *folder.glob("vae")):
        path.chmod(0o755)
    shutil.rmtree(parent)


def test_existing_weights_pass(model: Path) -> None:
    assert check(str(model)) == (0, "")
    assert check(f"name={model},emoji") == (0, "")
    assert check("emoji") == (0, "")


@pytest.mark.parametrize("name", shipped_models())
def test_shipped_checkpoints_pass(model: Path, name: str) -> None:
    shutil.copytree(ROOT / "models" / "checkpoints" / name, model.parent / name)
    assert check(str(model.parent / name)) == (0, "")


def test_a_missing_directory_is_reported(model: Path) -> None:
    code, line = check(f"emoji,other={model}-2")
    assert code == 1
    assert line == f"weights: {model}-2 is not a directory; mount a volume with Diffusers directories there\n"


def assert_refused(model: Path, path: Path, rule: str) -> None:
    code, line = check(f"x={model}")
    assert code == 1
    assert line.startswith(f"weights: {path} is {rule}")
    assert line.endswith("; mount a volume with Diffusers directories there\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("model_index.json", None, "not readable"),
        ("vae/model.safetensors", b"", "empty"),
        ("vae/model.safetensors", None, "without *.safetensors files"),
        ("vae/model.safetensors", WHOLE[:-1], f"damaged ({len(WHOLE) - 1} bytes; its header announces {len(WHOLE)})"),
        ("vae/model.safetensors", WHOLE + b"x", f"damaged ({len(WHOLE) + 1} bytes; its header announces {len(WHOLE)})"),
        ("vae/model.safetensors", WHOLE[:50], f"damaged (50 bytes; its header announces {8 + len(HEADER)})"),
        ("vae/model.safetensors", WHOLE[:4], f"damaged (4 bytes; its header announces {8 + len(HEADER)})"),
        ("vae/model.safetensors", b"version https://git-lfs", "not a safetensors file"),
    ],
)
def test_a_damaged_file_is_reported(model: Path, name: str, content: bytes | None, rule: str) -> None:
    path = model / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert_refused(model, model if rule.startswith("without") else path, rule)


def test_an_empty_directory_is_reported(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()
    assert_refused(model, model / "model_index.json", "not readable")


@pytest.mark.parametrize(
    ("name", "mode"),
    [("vae/model.safetensors", 0), ("model_index.json", 0), ("vae", 0), ("vae", 0o311), ("vae", 0o644)],
)
def test_an_unreadable_path_is_reported(model: Path, name: str, mode: int) -> None:
    (model / name).chmod(mode)
    assert_refused(model, model / name, "not readable")


def test_a_broken_link_is_reported(model: Path) -> None:
    (model / "vae" / "second.safetensors").symlink_to(model / "nowhere")
    assert_refused(model, model / "vae" / "second.safetensors", "not readable")
