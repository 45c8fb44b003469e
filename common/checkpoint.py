"""Reads and validates a Diffusers checkpoint directory, without torch.

Opening a checkpoint reads configurations, vocabularies and safetensors headers, but no weights, so that every process
that serves the model, including the coordinator, detects a truncated download at its start. Only the fingerprint reads
samples of the weights.
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
# Configuration files of modules without weights, by the suffix of their class names.
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
    """Contents of one module's directory: configuration, weight files and, for a tokenizer, vocabulary."""

    config: Mapping[str, Any]
    weights: WeightFiles
    vocabulary: Vocabulary | None = None


class Checkpoint:
    """A valid Diffusers directory: all modules exist and no weight file is truncated. Created by open()."""

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
        """Read a directory. Raises CheckpointError with the path that is missing or unreadable."""
        path, index = _read_index(path)
        return cls(path, index, _read_sampling_defaults(path))

    @property
    def name(self) -> str:
        """Name of the directory, or ORG--NAME of the repository for a snapshot in the Hugging Face cache."""
        return repository_of(self.path) or self.path.name

    @property
    def pipeline_name(self) -> str:
        """The pipeline's `_class_name`."""
        return str(self.index["_class_name"])

    def module_config(self, name: str) -> Mapping[str, Any]:
        """Return a module's config.json, or the corresponding file of a scheduler, tokenizer or processor."""
        return self._module(name).config

    def with_roles(self, roles: Mapping[str, str]) -> Checkpoint:
        """Return a copy that resolves `roles`, the module name of each role of a pipeline."""
        served = copy.copy(self)
        served._roles = roles
        return served

    def config_of(self, role: str) -> Mapping[str, Any]:
        """Return the configuration of the module with a role. A role that with_roles() did not set is a module name."""
        return self.module_config(self._roles.get(role, role))

    def weight_files(self, name: str) -> tuple[Path, ...]:
        """Return a module's safetensors files, sorted; empty for a scheduler, tokenizer or processor."""
        return tuple(self._module(name).weights.headers)

    def weight_headers(self, name: str) -> Mapping[Path, SafetensorsHeader]:
        """Return the headers (names, dtypes and shapes of tensors) of a module's safetensors files."""
        return self._module(name).weights.headers

    def weight_variant(self, name: str) -> str | None:
        """Return the Diffusers variant of a module's weight files, such as "fp16"; None for files without one."""
        return self._module(name).weights.variant

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the checkpoint's files, independent of the directory's name.

        Covers all bytes of configurations and tokenizers. Covers the headers and sizes of weight files, and the first,
        middle and last KiB of every tensor. Excludes sampling_defaults.json, which changes requests, not computations.
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
        """Raise CheckpointError for a tokenizer with more tokens than its text encoder has embeddings."""
        for name, module in self._opened.items():
            encoder = name.replace("tokenizer", "text_encoder")
            if module.vocabulary is None or encoder not in self._opened or encoder == name:
                continue
            config = self._opened[encoder].config
            text = config.get("text_config")
            known = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
            if isinstance(known, int) and module.vocabulary.size > known:
                raise CheckpointError(
                    f"{module.vocabulary.file}: {name} has {module.vocabulary.size} tokens, but {encoder} has "
                    f"embeddings for {known}"
                )

    def _module(self, name: str) -> _Module:
        if name not in self._opened:
            raise CheckpointError(f"{self.path} has no module {name!r}; it has {', '.join(self.modules)}")
        return self._opened[name]


def read_class_name(path: Path) -> str:
    """Return the `_class_name` of a directory without reading its modules. Raises CheckpointError."""
    _, index = _read_index(path)
    return str(index["_class_name"])


def _read_index(path: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the resolved directory and its model_index.json, validated to have a `_class_name`."""
    check_link(path.expanduser())
    path = path.expanduser().resolve()
    where = path / INDEX_FILE
    if not path.is_dir() or not is_listed(where):
        raise CheckpointError(explain(path))
    index = read_json(where)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{where} has no _class_name, which names the pipeline; download it again")
    return path, index


def _module_classes(path: Path, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return (library, class) of each module in model_index.json. An entry [null, null] is an omitted module."""
    where = path / INDEX_FILE
    modules: dict[str, tuple[str, str]] = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
            continue
        match entry:
            case [str() as library, str() as class_name]:
                modules[name] = (library, class_name)
            case _:
                raise CheckpointError(f"{where}: {name}: {json.dumps(entry)} is not [library, class]")
        if not (name.isidentifier() and is_file_name(name)):
            raise CheckpointError(f"{where}: module {name!r} is not a valid directory name; use an identifier")
        check_link(path / name)
        if not (path / name).is_dir():
            raise CheckpointError(f"{path} lacks the directory {name}/ of a module in {INDEX_FILE}; download it again")
    return modules


def kind_of(class_name: str) -> str | None:
    """Return the kind of a module without weights, a key of _OTHER_CONFIGS; None for other classes.

    A processor counts as a tokenizer if only its tokenizer is used.
    """
    if has_vocabulary(class_name):
        return "Tokenizer"
    stem = _SUFFIXES_OF_CLASSES.sub("", class_name)
    return next((kind for kind in _OTHER_CONFIGS if stem.endswith(kind)), None)


def _open_module(folder: Path, library: str, class_name: str) -> _Module:
    """Read a module: its weights and config.json, or the configuration file of a module without weights."""
    kind = kind_of(class_name)
    for path in sorted(folder.iterdir()):
        # tokenizer.json has several megabytes and is parsed by read_vocabulary().
        parsed_later = path.name == TOKENIZER_FILE and has_vocabulary(class_name)
        if path.suffix == ".json" and not is_weight_file(path.name) and not parsed_later:
            read_json(path)
    if kind is not None:
        config = read_settings(_first_of(folder, _OTHER_CONFIGS[kind]))
        return _Module(config, WeightFiles(), read_vocabulary(folder, class_name) if kind == "Tokenizer" else None)
    weights = read_weights(folder, library)
    if not weights.headers and not is_listed(folder / _MODEL_CONFIG):
        # A plugin's class without weights can have any name.
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
    """Return whether a file other than weights can affect the computation."""
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
        f"{file}: {name}: {json.dumps(value)} is not a number, a boolean, a string or a list of numbers; remove it"
    )


def _sample(path: Path, header: SafetensorsHeader) -> bytes:
    """Return the file's size and header, and up to three blocks of 1 KiB of every tensor."""
    parts = [str(header.file_size).encode(), header.raw]
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            last = max(tensor.begin, tensor.end - _SAMPLE_BYTES)
            for start in sorted({tensor.begin, (tensor.begin + last) // 2, last}):
                file.seek(header.data_start + start)
                parts.append(file.read(min(_SAMPLE_BYTES, tensor.end - start)))
    return b"".join(parts)
