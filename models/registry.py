"""Registry of supported pipelines and the configs of their variants.

A pipeline file defines `EntryClass` and `register_configs(registry)`. The registry discovers the files in
models/pipelines and in the plugin directories of the service settings. Configs are registered by reference, so that
loading the registry does not import torch.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import CheckpointError
from common.pipeline import ComposedPipeline
from models import pipelines


@dataclass(frozen=True)
class ConfigReferences:
    """References to a variant's SamplingParams and PipelineConfig, each "package.module:Class"."""

    sampling_params: str
    pipeline_config: str


@dataclass(frozen=True)
class PipelineEntry:
    """A pipeline class with the configs of its variants, by variant name."""

    pipeline: type[ComposedPipeline]
    configs: Mapping[str, ConfigReferences]

    def configs_of(self, variant: str) -> ConfigReferences:
        """Return the configs of one variant. Raises ValueError for a variant without configs."""
        if variant not in self.configs:
            name = self.pipeline.pipeline_name
            raise ValueError(
                f"variant {variant!r} of pipeline {name} has no configs; register them in its register_configs()"
            )
        return self.configs[variant]


@dataclass
class Registry:
    """Pipelines by `_class_name`. Registering a name twice is an error."""

    _configs: dict[str, dict[str, ConfigReferences]] = field(default_factory=dict)
    _pipelines: dict[str, type[ComposedPipeline]] = field(default_factory=dict)

    def register_configs(
        self, pipeline_name: str, *, sampling_params: str, pipeline_config: str, variant: str = ""
    ) -> None:
        """Register the config references of a pipeline's variant. Raises ValueError on a duplicate."""
        variants = self._configs.setdefault(pipeline_name, {})
        if variant in variants:
            of = f"variant {variant!r} of {pipeline_name}" if variant else pipeline_name
            raise ValueError(f"configs of {of} are registered twice")
        variants[variant] = ConfigReferences(sampling_params, pipeline_config)

    def register_pipeline(self, pipeline: type[ComposedPipeline]) -> None:
        """Register a pipeline class. Raises TypeError for another object, and ValueError on a duplicate."""
        if not (isinstance(pipeline, type) and issubclass(pipeline, ComposedPipeline)):
            raise TypeError(f"EntryClass: {pipeline!r} is not a subclass of ComposedPipeline")
        name = pipeline.pipeline_name
        if name in self._pipelines:
            raise ValueError(f"pipeline {name} is registered twice")
        self._pipelines[name] = pipeline

    def entry(self, pipeline_name: str) -> PipelineEntry:
        """Return the entry of a `_class_name`.

        Raises CheckpointError, which lists the supported names, and ValueError for a pipeline without configs.
        """
        if pipeline_name not in self._pipelines:
            message = f"pipeline {pipeline_name!r} is not supported; supported: {', '.join(self.names())}"
            if (relative := self.relative(pipeline_name)) is not None:
                message = f"{message}; the closest match is {relative}"
            raise CheckpointError(message)
        if pipeline_name not in self._configs:
            raise ValueError(f"pipeline {pipeline_name} has no configs; register them in its register_configs()")
        return PipelineEntry(self._pipelines[pipeline_name], self._configs[pipeline_name])

    def relative(self, pipeline_name: str) -> str | None:
        """Return the supported pipeline with the longest prefix that `pipeline_name` starts with, or None.

        Prefixes are the pipeline's name without "Pipeline" and the names in its `relatives`. For example,
        QwenImageEditInpaintPipeline matches QwenImageEdit rather than QwenImage.
        """
        prefixes = {
            prefix: name
            for name, pipeline in sorted(self._pipelines.items())
            for prefix in (name.removesuffix("Pipeline"), *pipeline.relatives)
        }
        found = [each for each in prefixes if re.match(rf"{re.escape(each)}(?=[A-Z0-9])", pipeline_name)]
        return prefixes[max(found, key=len)] if found else None

    def names(self) -> list[str]:
        """The supported `_class_name`s, sorted."""
        return sorted(self._pipelines)


def resolve(reference: str) -> Any:
    """Import the object of a reference "package.module:Name". Raises ImportError if it does not exist."""
    module, _, name = reference.partition(":")
    contents = vars(importlib.import_module(module))
    if name not in contents:
        raise ImportError(f"{module} has no {name!r}, which {reference!r} refers to")
    return contents[name]


def load_registry(plugins: Iterable[Path] = ()) -> Registry:
    """Register the families of models/pipelines, then the families of the plugin directories.

    Each plugin directory is appended to sys.path, so that references can name its files. Files that define `EntryClass`
    are pipeline files; other files are not imported here, as they may import torch. Errors raised by a plugin are not
    wrapped. Raises CheckpointError for a directory that does not exist or has no pipeline file, and TypeError for a
    pipeline file without register_configs().
    """
    registry = Registry()
    for info in pkgutil.iter_modules(pipelines.__path__):
        _add_family(registry, importlib.import_module(f"{pipelines.__name__}.{info.name}"))
    for directory in plugins:
        _load_plugins(registry, directory)
    return registry


def _load_plugins(registry: Registry, directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"plugin directory {directory} does not exist")
    directory = directory.resolve()
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    found = [path for path in sorted(directory.glob("*.py")) if _defines_entry(path)]
    if not found:
        raise CheckpointError(f"plugin directory {directory} has no .py file that defines EntryClass")
    for path in found:
        module = importlib.import_module(path.stem)
        if module.__file__ is None or Path(module.__file__).resolve() != path:
            raise ImportError(f"{path} cannot be imported: {path.stem!r} is {module.__file__}; rename the file")
        _add_family(registry, module)


def _defines_entry(path: Path) -> bool:
    """Whether a file assigns or defines the name EntryClass, determined without running the file."""
    for statement in ast.parse(path.read_text(), str(path)).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="EntryClass")]) | ast.AnnAssign(target=ast.Name(id="EntryClass")):
                return True
            case ast.ClassDef(name="EntryClass"):
                return True
    return False


def _add_family(registry: Registry, module: ModuleType) -> None:
    """Register a pipeline file's pipeline and configs."""
    contents = vars(module)
    registry.register_pipeline(contents["EntryClass"])
    if "register_configs" not in contents:
        raise TypeError(
            f"{module.__name__} does not define register_configs(registry), which registers the family's configs"
        )
    contents["register_configs"](registry)
