"""The init container's check of the weights: one line that names the path, and exit code 1."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from manifests import K8S

SCRIPT = K8S / "components" / "weights" / "check_weights.sh"


def check(model: str) -> tuple[int, str]:
    """Exit code and stderr."""
    environ = os.environ | {"FLEET_MODEL": model}
    done = subprocess.run(["sh", str(SCRIPT)], env=environ, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "model.safetensors").write_bytes(b"12345678")
    return folder


def test_weights_that_are_there_pass(model: Path) -> None:
    assert check(str(model)) == (0, "")
    assert check(f"name={model},emoji") == (0, "")
    assert check("emoji") == (0, "")


def test_a_missing_directory_is_named(model: Path) -> None:
    code, line = check(f"emoji,other={model}-2")
    assert code == 1
    assert line == f"weights: {model}-2 is not a directory; mount a volume with Diffusers directories there\n"


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("model_index.json", None, "not readable"),
        ("vae/model.safetensors", b"", "empty"),
        ("vae/model.safetensors", None, "without *.safetensors files"),
    ],
)
def test_a_file_that_is_not_whole_is_named(model: Path, name: str, content: bytes | None, rule: str) -> None:
    path = model / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    code, line = check(f"x={model}")
    named = model if rule.startswith("without") else path
    assert code == 1
    assert line.startswith(f"weights: {named} is {rule};")
    assert line.count("\n") == 1


def test_a_broken_link_is_named(model: Path) -> None:
    (model / "vae" / "second.safetensors").symlink_to(model / "nowhere")
    code, line = check(str(model))
    assert code == 1
    assert line.startswith(f"weights: {model}/vae/second.safetensors is not readable;")
