"""The wheel holds everything that a service needs at run time, and no tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import grpc
import pytest
from packaging.requirements import Requirement

from fleet.v1 import generation_pb2_grpc, worker_pb2

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "configs", "models", "services")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_every_source_and_data_file_is_in_the_wheel(wheel_names: set[str]) -> None:
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = tracked.stdout.split() or [
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    ]
    assert paths
    assert not [path for path in paths if (ROOT / path).exists() and path not in wheel_names]
    assert "models/checkpoints/emoji/model_index.json" in wheel_names
    assert "fleet/v1/generation_pb2.py" in wheel_names
    assert "fleet/v1/generation.proto" in wheel_names


def test_nothing_else_is_in_the_wheel(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {*PACKAGES, "fleet", "externalscaler", f"diffusion_fleet-{PROJECT['version']}.dist-info"}
    assert not [name for name in wheel_names if "__pycache__" in name]


def _lower_bound(package: str) -> str:
    """The lower bound of a dependency in pyproject.toml."""
    for requirement in map(Requirement, PROJECT["dependencies"]):
        if requirement.name == package:
            return next(bound.version for bound in requirement.specifier if bound.operator == ">=")
    raise AssertionError(f"{package} is not a dependency")


def test_lower_bounds_equal_the_versions_of_the_committed_stubs() -> None:
    assert _lower_bound("grpcio") == generation_pb2_grpc.GRPC_GENERATED_VERSION
    source = Path(worker_pb2.__file__).read_text()
    version = re.search(r"Protobuf Python Version: (\S+)", source)
    assert version
    assert _lower_bound("protobuf") == version[1]
    assert grpc.__version__ >= "1.85"


def test_torch_is_limited_to_tested_releases() -> None:
    (torch,) = [each for each in map(Requirement, PROJECT["optional-dependencies"]["worker"]) if each.name == "torch"]
    assert str(torch.specifier) == "<2.14,>=2.11"
