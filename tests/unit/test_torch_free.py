"""The coordinator and the modules of commands import no torch, so that they start within a second."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "configs", "models", "services")
HEAVY = {"torch", "transformers", "diffusers", "numpy", "safetensors", "PIL", "opentelemetry"}

WITHOUT_TORCH = (
    "services.coordinator.__main__",
    "services.cli.__main__",
    "services.cli.status",
    "services.cli.trace",
    "services.cli.watch",
    "services.cli.cancel",
    "services.cli.models",
    "services.cli.size",
    "services.cli.doctor",
    "services.cli.generate",
    "services.cli.up",
    "common.rpc.probe",
)


# Import names of packages of the GPU extra that may be absent where tests run.
GPU_PACKAGES = {
    "cuda": "cuda-bindings",
    "fa3_fwd_interface": "fa3-fwd",
    "flash_attn": "flash-attn-4",
    "nvmath": "nvmath-python",
}


def _loaded(imports: str) -> set[str]:
    """Names in sys.modules of a new interpreter after an import."""
    program = f"{imports}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def _imports(source: str, body_only: bool) -> Iterator[str]:
    """Top-level names of absolute imports: of the module body only, or also of functions."""
    tree = ast.parse(source)
    for node in tree.body if body_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _undeclared(imported: Iterable[str], requirements: Iterable[str]) -> set[str]:
    """Imports that are not in the standard library, in this project or in one of the requirements."""
    declared = {_normalized(Requirement(each).name) for each in requirements}
    distributions = importlib.metadata.packages_distributions()
    return {
        name
        for name in set(imported) - sys.stdlib_module_names - {*PACKAGES, "fleet", "externalscaler"}
        if not declared.intersection(
            _normalized(each) for each in distributions.get(name, [GPU_PACKAGES.get(name, "")])
        )
    }


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _project() -> tuple[list[str], list[str]]:
    """Requirements of the project, and of its extras worker, gpu and tracing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return project["dependencies"], [*extras["worker"], *extras["gpu"], *extras["tracing"]]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_module_does_not_import_torch(module: str) -> None:
    assert not HEAVY & {name.partition(".")[0] for name in _loaded(f"import {module}")}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_module_imports_only_base_dependencies(module: str) -> None:
    base, _ = _project()
    names = [name for name in _loaded(f"import {module}") if name.startswith(tuple(f"{each}." for each in PACKAGES))]
    paths = [ROOT / (name.replace(".", "/") + ".py") for name in [*names, module]]
    imported = [each for path in paths if path.exists() for each in _imports(path.read_text(), body_only=True)]
    assert "common" in imported or module == "common.rpc.probe"
    assert not _undeclared(imported, base)


def test_every_imported_package_is_declared() -> None:
    base, extras = _project()
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    imported = {each for source in sources for each in _imports(source, body_only=False)}
    assert not _undeclared(imported, [*base, *extras])


def test_a_heavy_import_is_found() -> None:
    assert _loaded("import PIL") & HEAVY


def test_an_undeclared_import_is_found() -> None:
    source = "import os, grpc\ndef f():\n    from torch import nn"
    assert _undeclared(_imports(source, body_only=False), ["grpcio>=1"]) == {"torch"}
    assert not _undeclared(_imports(source, body_only=True), ["grpcio>=1"])
