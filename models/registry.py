"""Pipelines that this fleet can serve, and the configs of each of their variants.

A pipeline file defines `EntryClass` and `register_configs(registry)`. It is found by itself, in models/pipelines and in
the plugin directories that a service's settings name. Configs are registered by reference, so that reading the registry
imports no torch.
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
    """The SamplingParams and the PipelineConfig of one variant, each as "package.module:Class"."""

    sampling_params: str
    pipeline_config: str


@dataclass(frozen=True)
class PipelineEntry:
    """A pipeline class with the configs of its variants, by name."""

    pipeline: type[ComposedPipeline]
    configs: Mapping[str, ConfigReferences]

    def configs_of(self, variant: str) -> ConfigReferences:
        """The configs of one variant. Raises ValueError for a variant that has none."""
        if variant not in self.configs:
            name = self.pipeline.pipeline_name
            raise ValueError(
                f"variant {variant!r} of pipeline {name} has no configs; register_configs() must name them"
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
        """Name the SamplingParams and the PipelineConfig of a pipeline's variant. Raises ValueError on a duplicate."""
        variants = self._configs.setdefault(pipeline_name, {})
        if variant in variants:
            of = f"variant {variant!r} of {pipeline_name}" if variant else pipeline_name
            raise ValueError(f"configs of {of} are registered twice")
        variants[variant] = ConfigReferences(sampling_params, pipeline_config)

    def register_pipeline(self, pipeline: type[ComposedPipeline]) -> None:
        """Add a pipeline class. Raises ValueError on a duplicate."""
        if not (isinstance(pipeline, type) and issubclass(pipeline, ComposedPipeline)):
            raise TypeError(f"EntryClass must be a ComposedPipeline, but is {pipeline!r}")
        name = pipeline.pipeline_name
        if name in self._pipelines:
            raise ValueError(f"pipeline {name} is registered twice")
        self._pipelines[name] = pipeline

    def entry(self, pipeline_name: str) -> PipelineEntry:
        """The entry of a `_class_name`. Raises CheckpointError that names the supported ones, and the nearest."""
        if pipeline_name not in self._pipelines:
            message = f"pipeline {pipeline_name!r} is not supported; supported are {', '.join(self.names())}"
            if (relative := self.relative(pipeline_name)) is not None:
                message = f"{message}; the nearest relative is {relative}"
            raise CheckpointError(message)
        if pipeline_name not in self._configs:
            raise ValueError(f"pipeline {pipeline_name} has no configs; call register_configs() in its family")
        return PipelineEntry(self._pipelines[pipeline_name], self._configs[pipeline_name])

    def relative(self, pipeline_name: str) -> str | None:
        """The supported `_class_name` that is nearest to another one; None where no family's name begins it.

        The longest beginning counts: QwenImageEditInpaintPipeline is nearer to QwenImageEdit than to QwenImage.
        """
        beginnings = {
            beginning: name
            for name, pipeline in sorted(self._pipelines.items())
            for beginning in (name.removesuffix("Pipeline"), *pipeline.relatives)
        }
        found = [each for each in beginnings if re.match(rf"{re.escape(each)}(?=[A-Z0-9])", pipeline_name)]
        return beginnings[max(found, key=len)] if found else None

    def names(self) -> list[str]:
        """The supported `_class_name`s, sorted."""
        return sorted(self._pipelines)


def resolve(reference: str) -> Any:
    """Import what "package.module:Name" refers to. Raises ImportError where there is nothing of that name."""
    module, _, name = reference.partition(":")
    contents = vars(importlib.import_module(module))
    if name not in contents:
        raise ImportError(f"{module} has no {name!r}, which {reference!r} refers to")
    return contents[name]


def load_registry(plugins: Iterable[Path] = ()) -> Registry:
    """Build the registry: the families of models/pipelines, then those of the plugin directories.

    A plugin directory is put on sys.path, so that references may name its files. Each of its files that defines
    `EntryClass` is a pipeline file; the others are not imported here, for they may need torch. Errors of a plugin are
    raised as they are; a pipeline file without register_configs() is a TypeError.
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
            raise ImportError(f"{path} cannot be imported: {path.stem!r} is {module.__file__}; give it another name")
        _add_family(registry, module)


def _defines_entry(path: Path) -> bool:
    """Whether a file assigns or defines the name EntryClass, told without running it."""
    for statement in ast.parse(path.read_text(), str(path)).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="EntryClass")]) | ast.AnnAssign(target=ast.Name(id="EntryClass")):
                return True
            case ast.ClassDef(name="EntryClass"):
                return True
    return False


def _add_family(registry: Registry, module: ModuleType) -> None:
    """Add the pipeline of a file, and let the file register its configs."""
    contents = vars(module)
    registry.register_pipeline(contents["EntryClass"])
    if "register_configs" not in contents:
        raise TypeError(f"{module.__name__} must define register_configs(registry), which names the family's configs")
    contents["register_configs"](registry)
