"""Model families outside the tree, as plugins: checkpoint directories and plugin directories."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

TOY_FAMILY = Path(__file__).parent / "toy_family"
RENAMED_FAMILY = Path(__file__).parent / "renamed_family"
PROTO = Path(__file__).parents[1] / "proto"
TWIN_FAMILY = Path(__file__).parent / "twin_family"
TOY_INDEX = {
    "_class_name": "ToyPipeline",
    "_diffusers_version": "0.42.1",
    "image_encoder": [None, None],
    "palette": ["toy", "ToyPalette"],
    "transformer": ["toy", "ToyTransformer"],
}


def build_toy_checkpoint(path: Path, *, cell: int = 8, seed: int = 0, pipeline: str = "ToyPipeline") -> Path:
    """Write a checkpoint of the toy family; returns its directory."""
    generator = torch.Generator().manual_seed(seed)
    _write_module(path / "palette", {"_class_name": "ToyPalette"}, torch.randn(256, 3, generator=generator))
    _write_module(path / "transformer", {"_class_name": "ToyTransformer", "cell": cell}, torch.tensor([0.9, 1.0, 1.1]))
    (path / "model_index.json").write_text(json.dumps({**TOY_INDEX, "_class_name": pipeline}))
    return path


def build_twin_checkpoint(path: Path, *, lens: bool = True) -> Path:
    """Write a TwinPipeline checkpoint; without `lens`, it has no variant "image". Returns its directory."""
    build_toy_checkpoint(path)
    index = {**TOY_INDEX, "_class_name": "TwinPipeline"}
    if lens:
        index["lens"] = ["toy", "TwinLens"]
        _write_module(path / "lens", {"_class_name": "TwinLens"}, torch.tensor([1.0, 0.5, 2.0]))
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def copy_toy_family(directory: Path) -> Path:
    """Copy the plugin files to a directory, as a user would; returns the directory."""
    shutil.copytree(TOY_FAMILY, directory, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def copy_renamed_family(directory: Path) -> Path:
    """Copy the toy family and the renamed family, whose stubs are compiled from its own .proto files."""
    copy_toy_family(directory)
    shutil.copytree(RENAMED_FAMILY, directory, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    protos = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*.proto"))]
    compiler = (sys.executable, "-m", "grpc_tools.protoc", f"-I{directory}", f"-I{PROTO}")
    subprocess.run([*compiler, f"--python_out={directory}", *protos], check=True)
    return directory


@contextmanager
def toy_family(directory: Path, copy: Callable[[Path], Path] = copy_toy_family) -> Iterator[Path]:
    """Copy a plugin directory; unloads its modules afterwards."""
    try:
        yield copy(directory)
    finally:
        _forget(directory)


@contextmanager
def twin_family(directory: Path) -> Iterator[list[Path]]:
    """Copy the toy and twin plugins; unloads both afterwards. The twin plugin imports the toy plugin."""
    twin = directory / "twin"
    with toy_family(directory / "toy") as toy:
        try:
            shutil.copytree(TWIN_FAMILY, twin, ignore=shutil.ignore_patterns("__pycache__"))
            yield [toy, twin]
        finally:
            _forget(twin)


def _forget(directory: Path) -> None:
    """Unload the modules of a plugin directory."""
    sys.path[:] = [entry for entry in sys.path if entry != str(directory.resolve())]
    for file in directory.glob("*.py"):
        sys.modules.pop(file.stem, None)
    for file in directory.glob("fleet/v1/*.py"):
        sys.modules.pop(f"fleet.v1.{file.stem}", None)


def _write_module(folder: Path, config: dict[str, object], weight: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": weight}, folder / "diffusion_pytorch_model.safetensors")
