"""Models by the name that requests ask for: what a reference on a command line or in a settings file opens.

A reference is the NAME of a shipped model, a DIR in Diffusers' layout, or NAME=DIR. A bare word that is a shipped name
means the shipped model; a folder of the same name is written ./NAME.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import INDEX_FILE, SAMPLING_DEFAULTS_FILE, Checkpoint
from common.errors import CheckpointError, InvalidInput
from common.pipeline import ComposedPipeline
from common.wrong_model import repository_of
from configs.sample.base import ParameterSpec, SamplingParams
from models.composition import DENOISING_STAGE, SCHEDULER
from models.registry import PipelineEntry, Registry, resolve
from models.schedulers.support import check_scheduler

DEFAULT_MODEL = "emoji"

_SHIPPED = Path(__file__).parent / "checkpoints"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint, the pipeline that serves it, and the parameters that its requests may set."""

    name: str
    checkpoint: Checkpoint
    entry: PipelineEntry
    pipeline: ComposedPipeline
    sampling_params: type[SamplingParams]

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """What a request may set, with this checkpoint's defaults, and the pictures that it brings."""
        roles = self.sampling_params.image_roles(self.checkpoint)
        pictures = [
            ParameterSpec(role, "image", None, f"Picture to start from; {need}.")
            for need, names in (("needed", roles.required), ("may be left out", roles.optional))
            for role in names
        ]
        return (*self.sampling_params.parameters(self.checkpoint), *pictures)


def shipped_models() -> list[str]:
    """Names of the models that come with the package, sorted."""
    return sorted(index.parent.name for index in _SHIPPED.glob(f"*/{INDEX_FILE}"))


def open_model(reference: str, registry: Registry) -> ServedModel:
    """Open what a reference names. Reads no weights.

    Raises CheckpointError where there is no such model or it cannot be served, InvalidInput where NAME is no name.
    """
    name, directory = _locate(reference)
    checkpoint = Checkpoint.open(directory)
    entry = registry.entry(checkpoint.pipeline_name)
    params = resolve(entry.sampling_params)
    if not (isinstance(params, type) and issubclass(params, SamplingParams)):
        raise TypeError(f"{entry.sampling_params} is not a SamplingParams")
    pipeline = entry.pipeline(checkpoint.modules)
    _check_scheduler(pipeline, checkpoint)
    _check_defaults(params, checkpoint)
    return ServedModel(name, checkpoint, entry, pipeline, params)


def _locate(reference: str) -> tuple[str, Path]:
    """The name and directory that a reference means."""
    name, separator, directory = reference.partition("=")
    if separator and "/" not in name:
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-'", field="model")
        return name, Path(directory)
    if reference in shipped_models():
        return reference, _SHIPPED / reference
    path = Path(reference).expanduser()
    if not reference or not (path.exists() or path.is_symlink()):
        shipped = ", ".join(shipped_models())
        raise CheckpointError(f"{reference!r} is neither a directory nor a model that comes along ({shipped})")
    return _name_of(path.resolve()), path


def _name_of(path: Path) -> str:
    """The folder's name, or ORG--NAME of a snapshot in the Hugging Face cache; other characters are replaced."""
    return _UNSAFE.sub("-", repository_of(path) or path.name).lstrip("._-")[:64] or "model"


def _check_scheduler(pipeline: ComposedPipeline, checkpoint: Checkpoint) -> None:
    """Refuse a scheduler that the standard denoising stage does not run. Raises CheckpointError."""
    for stage in (stage for service in pipeline.services for stage in service.stages):
        if stage.implementation == DENOISING_STAGE:
            name = stage.modules[SCHEDULER]
            check_scheduler(checkpoint.modules[name][1], checkpoint.module_config(name))


def _check_defaults(params: type[SamplingParams], checkpoint: Checkpoint) -> None:
    """Refuse a model whose own defaults no request could run with."""
    try:
        params.build({"prompt": ""}, checkpoint)
    except InvalidInput as error:
        raise CheckpointError(f"{checkpoint.path / SAMPLING_DEFAULTS_FILE}: {error.message}") from None
