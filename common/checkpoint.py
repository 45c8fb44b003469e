"""A Diffusers checkpoint directory, read without torch: what it holds, and whether it is whole.

Opening reads JSON files and safetensors headers, never weights, so that a truncated download is refused in
milliseconds by every process that serves the model, the coordinator included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.artifacts import ParamValue
from common.errors import CheckpointError
from common.safetensors_header import SafetensorsHeader, read_header

INDEX_FILE = "model_index.json"
SAMPLING_DEFAULTS_FILE = "sampling_defaults.json"

_MODEL_CONFIG = "config.json"
# What schedulers, tokenizers and processors have in its place; the first that exists is the module's.
_OTHER_CONFIGS = ("scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_SAMPLE_BYTES = 1024
_LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class _Module:
    """One module's folder: its settings, and the headers of its weight files in the order of their names."""

    config: Mapping[str, Any]
    weights: Mapping[Path, SafetensorsHeader]


class Checkpoint:
    """A Diffusers directory whose every module was found and whose weight files are whole. Made by open()."""

    def __init__(self, path: Path, index: Mapping[str, Any], defaults: Mapping[str, ParamValue]) -> None:
        self.path = path
        self.index = index
        self.sampling_defaults = defaults
        self.modules = _module_classes(path, index)
        self._opened = {name: _open_module(path / name) for name in self.modules}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read a directory. Raises CheckpointError that says what is missing or unreadable, and where."""
        path = path.expanduser().resolve()
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; a model is a Diffusers directory with {INDEX_FILE}")
        if not (path / INDEX_FILE).is_file():
            raise CheckpointError(f"{path} has no {INDEX_FILE}, so it is not a Diffusers directory")
        return cls(path, _read_json(path / INDEX_FILE), _read_sampling_defaults(path))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def pipeline_name(self) -> str:
        """The pipeline's `_class_name`."""
        return str(self.index["_class_name"])

    def module_config(self, name: str) -> Mapping[str, Any]:
        """A module's settings: its config.json, or what schedulers, tokenizers and processors have in its place."""
        return self._module(name).config

    def weight_files(self, name: str) -> tuple[Path, ...]:
        """A module's safetensors files, sorted; none for a scheduler, tokenizer or processor."""
        return tuple(self._module(name).weights)

    def weight_headers(self, name: str) -> Mapping[Path, SafetensorsHeader]:
        """The same files with their headers: names, dtypes and shapes of the tensors."""
        return self._module(name).weights

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest that is equal where the weights are, whatever the directory is called.

        Cheap: settings and tokenizers whole; of the weights the headers, the sizes, and the first, middle and last
        KiB of every tensor. sampling_defaults.json is left out: it changes what is asked for, not what is computed.
        """
        digest = hashlib.sha256()
        for label, data in self._fingerprinted():
            digest.update(f"{label}\0{len(data)}\0".encode())
            digest.update(data)
        return digest.hexdigest()

    def _fingerprinted(self) -> Iterator[tuple[str, bytes]]:
        yield INDEX_FILE, _read_bytes(self.path / INDEX_FILE)
        for name in sorted(self.modules):
            weights = self._module(name).weights
            for path in sorted((self.path / name).iterdir()):
                label = f"{name}/{path.name}"
                if path in weights:
                    yield label, _sample(path, weights[path])
                elif path.is_file() and path.suffix not in {".md", ".safetensors", ".bin"} and path.name[0] != ".":
                    yield label, _read_bytes(path)

    def _module(self, name: str) -> _Module:
        if name not in self._opened:
            raise CheckpointError(f"{self.path} has no module {name!r}; it has {', '.join(self.modules)}")
        return self._opened[name]


def _module_classes(path: Path, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The (library, class) of each module that model_index.json names; an entry of nulls is a module left out."""
    where = path / INDEX_FILE
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{where} has no _class_name, so it does not say which pipeline it is for")
    modules: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        match entry:
            case [str() as library, str() as class_name]:
                modules[name] = (library, class_name)
            case _:
                raise CheckpointError(f"{where}: {name} must be [library, class], but is {json.dumps(entry)}")
        if not (name.isidentifier() and _is_file_name(name)):
            raise CheckpointError(f"{where}: module {name!r} cannot be the name of a folder here")
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the folder {name}/, whose module {INDEX_FILE} names")
    return modules


def _is_file_name(text: str) -> bool:
    """Whether a file system could have it as the name of one file."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return size <= _LONGEST_NAME and "\0" not in text and Path(text).name == text


def _open_module(folder: Path) -> _Module:
    """Read a module: one with weights has config.json; one without has its own kind of file."""
    weights = _read_weights(folder)
    if not weights:
        for name in _OTHER_CONFIGS:
            if (file := folder / name).is_file():
                return _Module(_read_json(file), {})
    if not (folder / _MODEL_CONFIG).is_file():
        raise CheckpointError(f"{folder} holds none of {', '.join((_MODEL_CONFIG, *_OTHER_CONFIGS))}")
    if not weights:
        names = " or ".join(f"{stem}.safetensors" for stem in _WEIGHT_STEMS)
        raise CheckpointError(f"{folder} holds no weights; {names} is needed (pickled weights are not read)")
    return _Module(_read_json(folder / _MODEL_CONFIG), weights)


def _read_weights(folder: Path) -> dict[Path, SafetensorsHeader]:
    """The headers of the module's weight files: those that its shard index names, or its single one."""
    for stem in _WEIGHT_STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _read_shards(index)
        if (single := folder / f"{stem}.safetensors").is_file():
            return {single: read_header(single)}
    return {}


def _read_shards(index: Path) -> dict[Path, SafetensorsHeader]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise CheckpointError(f"{index}: {tensor} must name a file of the same folder, but is {file!r}")
    headers: dict[Path, SafetensorsHeader] = {}
    for path in sorted({index.parent / file for file in weight_map.values()}):
        if not path.is_file():
            raise CheckpointError(f"{index} names {path.name}, which is missing")
        headers[path] = read_header(path)
    for tensor, file in weight_map.items():
        if tensor not in headers[index.parent / file].tensors:
            raise CheckpointError(f"{index} says that {file} holds {tensor}, but it does not")
    return headers


def _read_sampling_defaults(path: Path) -> dict[str, ParamValue]:
    file = path / SAMPLING_DEFAULTS_FILE
    if not file.exists():
        return {}
    return {name: _param_value(file, name, value) for name, value in _read_json(file).items()}


def _param_value(file: Path, name: str, value: Any) -> ParamValue:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        return tuple(float(each) for each in value)
    raise CheckpointError(
        f"{file}: {name} must be a number, a truth value, a text or a list of numbers, but is {json.dumps(value)}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds {type(value).__name__}")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _sample(path: Path, header: SafetensorsHeader) -> bytes:
    """The file's size and header, and a few blocks of every tensor."""
    parts = [str(header.file_size).encode(), header.raw]
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            last = max(tensor.begin, tensor.end - _SAMPLE_BYTES)
            for start in sorted({tensor.begin, (tensor.begin + last) // 2, last}):
                file.seek(header.data_start + start)
                parts.append(file.read(min(_SAMPLE_BYTES, tensor.end - start)))
    return b"".join(parts)
