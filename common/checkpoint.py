"""A Diffusers checkpoint directory, read without torch: what it holds, and whether it is whole.

Opening reads JSON files and safetensors headers, never weights, so that a truncated download is refused in
milliseconds by every process that serves the model, the coordinator included.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.artifacts import ParamValue
from common.errors import CheckpointError
from common.json_file import check_link, is_listed, read_bytes, read_json, read_settings
from common.safetensors_header import SafetensorsHeader
from common.vocabulary import TOKENIZER_FILE, Vocabulary, has_vocabulary, read_vocabulary
from common.weight_files import WeightFiles, is_file_name, is_weight_file, no_weights, read_weights
from common.wrong_model import explain, repository_of

INDEX_FILE = "model_index.json"
SAMPLING_DEFAULTS_FILE = "sampling_defaults.json"

_MODEL_CONFIG = "config.json"
# Settings of modules without weights, by what the name of their class ends with.
_OTHER_CONFIGS: Mapping[str, tuple[str, ...]] = {
    "Scheduler": ("scheduler_config.json",),
    "Tokenizer": ("tokenizer_config.json",),
    "Processor": ("preprocessor_config.json", "processor_config.json"),
    "FeatureExtractor": ("preprocessor_config.json",),
}
_SUFFIXES_OF_CLASSES = re.compile(r"(Fast|Pil)$")
_SAMPLE_BYTES = 1024


@dataclass(frozen=True)
class _Module:
    """One module's folder: its settings, its weight files, and of a tokenizer its vocabulary."""

    config: Mapping[str, Any]
    weights: WeightFiles
    vocabulary: Vocabulary | None = None


class Checkpoint:
    """A Diffusers directory whose every module was found and whose weight files are whole. Made by open()."""

    def __init__(self, path: Path, index: Mapping[str, Any], defaults: Mapping[str, ParamValue]) -> None:
        self.path = path
        self.index = index
        self.sampling_defaults = defaults
        self.modules = _module_classes(path, index)
        self._roles: Mapping[str, str] = {}
        self._opened = {name: _open_module(path / name, *entry) for name, entry in self.modules.items()}
        self._check_vocabularies()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read a directory. Raises CheckpointError that says what is missing or unreadable, and where."""
        path, index = _read_index(path)
        return cls(path, index, _read_sampling_defaults(path))

    @property
    def name(self) -> str:
        """The folder's name; of a snapshot in the Hugging Face cache that of its repository, ORG--NAME."""
        return repository_of(self.path) or self.path.name

    @property
    def pipeline_name(self) -> str:
        """The pipeline's `_class_name`."""
        return str(self.index["_class_name"])

    def module_config(self, name: str) -> Mapping[str, Any]:
        """A module's settings: its config.json, or what schedulers, tokenizers and processors have in its place."""
        return self._module(name).config

    def with_roles(self, roles: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint for a pipeline, which says which of its modules has which role."""
        served = copy.copy(self)
        served._roles = roles
        return served

    def config_of(self, role: str) -> Mapping[str, Any]:
        """The settings of the module with a role; without a pipeline, roles are the modules' names."""
        return self.module_config(self._roles.get(role, role))

    def weight_files(self, name: str) -> tuple[Path, ...]:
        """A module's safetensors files, sorted; none for a scheduler, tokenizer or processor."""
        return tuple(self._module(name).weights.headers)

    def weight_headers(self, name: str) -> Mapping[Path, SafetensorsHeader]:
        """The same files with their headers: names, dtypes and shapes of the tensors."""
        return self._module(name).weights.headers

    def weight_variant(self, name: str) -> str | None:
        """The variant that a module's weight files are, such as "fp16"; None for plain ones."""
        return self._module(name).weights.variant

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
        yield INDEX_FILE, read_bytes(self.path / INDEX_FILE)
        for name in sorted(self.modules):
            weights = self._module(name).weights
            for path in sorted((self.path / name).iterdir()):
                label = f"{name}/{path.name}"
                if path in weights.headers:
                    yield label, _sample(path, weights.headers[path])
                elif path == weights.index or _is_setting(path):
                    yield label, read_bytes(path)

    def _check_vocabularies(self) -> None:
        """Refuse a tokenizer whose tokens its encoder has no embeddings for. Their names differ by these words."""
        for name, module in self._opened.items():
            encoder = name.replace("tokenizer", "text_encoder")
            if module.vocabulary is None or encoder not in self._opened or encoder == name:
                continue
            config = self._opened[encoder].config
            text = config.get("text_config")
            known = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
            if isinstance(known, int) and module.vocabulary.size > known:
                raise CheckpointError(
                    f"{module.vocabulary.file}: {name} has {module.vocabulary.size} tokens, but {encoder} knows {known}"
                )

    def _module(self, name: str) -> _Module:
        if name not in self._opened:
            raise CheckpointError(f"{self.path} has no module {name!r}; it has {', '.join(self.modules)}")
        return self._opened[name]


def read_class_name(path: Path) -> str:
    """The `_class_name` of a directory, without a look at its modules. Raises CheckpointError as Checkpoint.open()."""
    _, index = _read_index(path)
    return str(index["_class_name"])


def _read_index(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """The resolved directory and its model_index.json, which has a `_class_name`."""
    check_link(path.expanduser())
    path = path.expanduser().resolve()
    where = path / INDEX_FILE
    if not path.is_dir() or not is_listed(where):
        raise CheckpointError(explain(path))
    index = read_json(where)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{where} has no _class_name, so it does not say which pipeline it is for")
    return path, index


def _module_classes(path: Path, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The (library, class) of each module that model_index.json names; an entry of nulls is a module left out."""
    where = path / INDEX_FILE
    modules: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        match entry:
            case [str() as library, str() as class_name]:
                modules[name] = (library, class_name)
            case _:
                raise CheckpointError(f"{where}: {name} must be [library, class], but is {json.dumps(entry)}")
        if not (name.isidentifier() and is_file_name(name)):
            raise CheckpointError(f"{where}: module {name!r} cannot be the name of a folder here")
        check_link(path / name)
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the folder {name}/, whose module {INDEX_FILE} names")
    return modules


def kind_of(class_name: str) -> str | None:
    """The kind of a module without weights, a key of _OTHER_CONFIGS; None for a class that may have weights.

    A processor of which the tokenizer alone is used is a tokenizer.
    """
    if has_vocabulary(class_name):
        return "Tokenizer"
    stem = _SUFFIXES_OF_CLASSES.sub("", class_name)
    return next((kind for kind in _OTHER_CONFIGS if stem.endswith(kind)), None)


def _open_module(folder: Path, library: str, class_name: str) -> _Module:
    """Read a module: one with weights has config.json; one without has its own kind of file."""
    kind = kind_of(class_name)
    for path in sorted(folder.iterdir()):
        # A tokenizer.json is megabytes long: one parse, by read_vocabulary(), is enough.
        parsed_later = path.name == TOKENIZER_FILE and has_vocabulary(class_name)
        if path.suffix == ".json" and not is_weight_file(path.name) and not parsed_later:
            read_json(path)
    if kind is not None:
        config = read_settings(_first_of(folder, _OTHER_CONFIGS[kind]))
        return _Module(config, WeightFiles(), read_vocabulary(folder, class_name) if kind == "Tokenizer" else None)
    weights = read_weights(folder, library)
    if not weights.headers and not is_listed(folder / _MODEL_CONFIG):
        # A plugin's class without weights may have any name.
        names = (_MODEL_CONFIG, *(name for names in _OTHER_CONFIGS.values() for name in names))
        return _Module(read_settings(_first_of(folder, names)), weights)
    config = read_settings(_first_of(folder, (_MODEL_CONFIG,)))
    if not weights.headers:
        raise no_weights(folder, library)
    return _Module(config, weights)


def _first_of(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if is_listed(folder / name):
            return folder / name
    raise CheckpointError(f"{folder} lacks {' or '.join(names)}; download it again")


def _is_setting(path: Path) -> bool:
    """Whether a file besides weights can change what is computed."""
    return path.is_file() and path.suffix != ".md" and path.name[0] != "." and not is_weight_file(path.name)


def _read_sampling_defaults(path: Path) -> dict[str, ParamValue]:
    file = path / SAMPLING_DEFAULTS_FILE
    if not is_listed(file):
        return {}
    return {name: _param_value(file, name, value) for name, value in read_json(file).items()}


def _param_value(file: Path, name: str, value: Any) -> ParamValue:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value):
        return tuple(float(each) for each in value)
    raise CheckpointError(
        f"{file}: {name} must be a number, a truth value, a text or a list of numbers, but is {json.dumps(value)}"
    )


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
