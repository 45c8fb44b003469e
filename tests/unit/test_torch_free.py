"""The coordinator and the thin commands load no tensors' library: their image is small and they start in a second."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "diffusers", "numpy", "safetensors", "PIL"}

THIN = (
    "services.coordinator.__main__",
    "services.cli.__main__",
    "services.cli.status",
    "services.cli.watch",
    "services.cli.cancel",
    "services.cli.models",
    "services.cli.generate",
    "services.cli.up",
    "common.rpc.probe",
)


def _loaded(imports: str) -> set[str]:
    """Top-level names in sys.modules of a new interpreter after an import."""
    program = f"{imports}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.split()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that these bring, themselves included, on this Python without extras."""
    found: set[str] = set()
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = _normal(requirement.name)
        if name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += importlib.metadata.requires(name) or []
    return found


@pytest.mark.parametrize("module", THIN)
def test_importing_it_leaves_torch_out(module: str) -> None:
    assert not HEAVY & _loaded(f"import {module}")


@pytest.mark.parametrize("module", THIN)
def test_it_needs_the_base_dependencies_alone(module: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = _closure(project["dependencies"]) | {project["name"]}
    distributions = importlib.metadata.packages_distributions()
    loaded = _loaded(f"import {module}") - _loaded("")
    assert not [
        name
        for name in loaded
        if name in distributions and not allowed.intersection(_normal(each) for each in distributions[name])
    ]


def test_a_heavy_import_is_seen() -> None:
    assert _loaded("import PIL") & HEAVY


def test_a_closure_ends_where_an_extra_begins() -> None:
    assert "protobuf" in _closure(["grpcio-health-checking"])
    assert "grpcio-tools" not in _closure(["grpcio"])
