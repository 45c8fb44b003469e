"""Opens models by reference, as given on a command line or in a settings file.

A reference is the NAME of a shipped model, a DIR in Diffusers' layout, or NAME=DIR. A shipped name takes precedence
over a directory of the same name: write ./NAME to open the directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.checkpoint import INDEX_FILE, SAMPLING_DEFAULTS_FILE, Checkpoint, read_class_name
from common.errors import CheckpointError, InvalidInput
from common.logs import get_logger
from common.pipeline import ComposedPipeline, MissingModules, PipelineError, ServiceSpec, unite_roles
from common.variants import unite_services
from common.wrong_model import repository_of
from configs.sample.base import ImageRoles, ParameterSpec, SamplingParams
from models.composition import DENOISING_STAGE, SCHEDULER
from models.registry import PipelineEntry, Registry, resolve
from models.schedulers.support import check_scheduler

DEFAULT_MODEL = "emoji"

_SHIPPED = Path(__file__).parent / "checkpoints"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_VARIANT = re.compile(r"[a-z][a-z0-9_]{0,31}")

_log = get_logger(__name__)


@dataclass(frozen=True)
class ServedVariant:
    """One variant of a model's requests: its pipeline, ordered services, parameters and image roles.

    `name` is empty if the model has only one variant. `pipeline_config` is a reference "package.module:Class";
    importing the class imports torch.
    """

    name: str
    pipeline: ComposedPipeline
    services: tuple[ServiceSpec, ...]
    sampling_params: type[SamplingParams]
    pipeline_config: str
    roles: ImageRoles
    specs: tuple[ParameterSpec, ...]

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The request's parameters, with the checkpoint's defaults, and its image roles."""
        return (*self.specs, *_image_parameters(self.roles))

    @property
    def label(self) -> str:
        """The variant's name and image roles for error messages, such as "text (no images)"."""
        images = [*self.roles.required, *(f"optional {role}" for role in self.roles.optional)]
        return f"{self.name} ({', '.join(images) or 'no images'})"


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint with its served variants and the services of all variants.

    `unserved` maps each variant that cannot be served to the reason. Each service in `services` has the union of its
    contracts in all variants.
    """

    name: str
    checkpoint: Checkpoint
    variants: tuple[ServedVariant, ...]
    services: tuple[ServiceSpec, ...]
    unserved: Mapping[str, str] = field(default_factory=dict)

    def service(self, name: str) -> ServiceSpec:
        """Return one of `services` by name. Raises InvalidInput, which lists the model's services."""
        for spec in self.services:
            if spec.service == name:
                return spec
        used = ", ".join(spec.service for spec in self.services)
        message = f"{self.checkpoint.pipeline_name} has no {name} service; it has {used}"
        if self.unserved:
            reasons = "; ".join(f"variant {variant} is not served: {why}" for variant, why in self.unserved.items())
            message = f"{message} ({reasons})"
        raise InvalidInput(message, field="service")

    def variant(self, name: str) -> ServedVariant | None:
        """Return a variant by name, or None if it is not served."""
        return next((each for each in self.variants if each.name == name), None)

    def variants_of(self, service: str) -> list[tuple[ServedVariant, ServiceSpec]]:
        """The variants that use a service, in order, each with its own contract for the service."""
        return [(each, spec) for each in self.variants for spec in each.services if spec.service == service]

    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The parameters of all variants; the default is taken from the first variant with the parameter."""
        required = frozenset.intersection(*(frozenset(each.roles.required) for each in self.variants))
        roles = dict.fromkeys(role for each in self.variants for role in (*each.roles.required, *each.roles.optional))
        images = ImageRoles(
            tuple(role for role in roles if role in required), tuple(role for role in roles if role not in required)
        )
        specs = {spec.name: spec for each in reversed(self.variants) for spec in each.specs}
        names = dict.fromkeys(spec.name for each in self.variants for spec in each.specs)
        return (*(specs[name] for name in names), *_image_parameters(images))


def _image_parameters(roles: ImageRoles) -> list[ParameterSpec]:
    return [
        ParameterSpec(role, "image", None, f"Input image; {need}.")
        for need, names in (("required", roles.required), ("optional", roles.optional))
        for role in names
    ]


def shipped_models() -> list[str]:
    """Names of the models shipped with the package, sorted."""
    return sorted(index.parent.name for index in _SHIPPED.glob(f"*/{INDEX_FILE}"))


def open_model(reference: str, registry: Registry) -> ServedModel:
    """Open the model of a reference, without reading weights.

    Variants whose modules are missing from the checkpoint are skipped with a logged warning, if another variant is
    served. Raises CheckpointError if the model does not exist or cannot be served, and InvalidInput if NAME is not a
    valid name.
    """
    name, directory = _locate(reference)
    # Check the pipeline class first: an unsupported pipeline may also have unknown modules.
    entry = registry.entry(read_class_name(directory))
    checkpoint = Checkpoint.open(directory)
    pipelines, unserved = _pipelines(entry, checkpoint)
    for variant, reason in unserved.items():
        _log.warning("variant is not served", model=name, variant=variant, reason=reason)
    checkpoint = checkpoint.with_roles(unite_roles(each.roles for each in pipelines.values()))
    variants = tuple(_variant(each, pipelines[each], entry, checkpoint) for each in pipelines)
    services = unite_services([each.services for each in variants])
    return ServedModel(name, checkpoint, variants, services, unserved)


def _pipelines(entry: PipelineEntry, checkpoint: Checkpoint) -> tuple[dict[str, ComposedPipeline], dict[str, str]]:
    """The pipelines of the served variants, and the reasons why the other variants are not served.

    Raises MissingModules if no variant can be served, and PipelineError for an invalid variant name.
    """
    classes = entry.pipeline.variants(checkpoint)
    for name in classes:
        if not (_VARIANT.fullmatch(name) or (not name and len(classes) == 1)):
            message = f"{entry.pipeline.pipeline_name}: variant {name!r} is not a lower-case identifier"
            raise PipelineError(f"{message} of at most 32 characters")
    pipelines: dict[str, ComposedPipeline] = {}
    unserved: dict[str, str] = {}
    for name, pipeline in classes.items():
        try:
            pipelines[name] = pipeline(checkpoint.modules)
        except MissingModules as error:
            unserved[name] = error.message
    if not pipelines:
        raise MissingModules("; ".join(dict.fromkeys(unserved.values())))
    return pipelines, unserved


def _variant(name: str, pipeline: ComposedPipeline, entry: PipelineEntry, checkpoint: Checkpoint) -> ServedVariant:
    configs = entry.configs_of(name)
    params = resolve(configs.sampling_params)
    if not (isinstance(params, type) and issubclass(params, SamplingParams)):
        raise TypeError(f"sampling_params: {configs.sampling_params} is not a subclass of SamplingParams")
    _check_scheduler(pipeline, checkpoint)
    _check_defaults(params, checkpoint)
    roles, specs = params.image_roles(checkpoint), params.parameters(checkpoint)
    return ServedVariant(name, pipeline, pipeline.services, params, configs.pipeline_config, roles, specs)


def _locate(reference: str) -> tuple[str, Path]:
    """Resolve a reference to a name and a directory."""
    name, separator, directory = reference.partition("=")
    if separator and "/" not in name:
        if not _NAME.fullmatch(name):
            message = f"model: {name!r} is not a model name"
            raise InvalidInput(f"{message}; 1 to 64 letters, digits, '.', '_' and '-' work", field="model")
        return name, Path(directory)
    if reference in shipped_models():
        return reference, _SHIPPED / reference
    path = Path(reference).expanduser()
    if not reference or not (path.exists() or path.is_symlink()):
        shipped = ", ".join(shipped_models())
        raise CheckpointError(
            f"model: {reference!r} is neither a directory nor a shipped model; shipped models: {shipped}"
        )
    return _name_of(path.resolve()), path


def _name_of(path: Path) -> str:
    """The directory's name, or ORG--NAME of a Hugging Face cache snapshot; unsafe characters become '-'."""
    return _UNSAFE.sub("-", repository_of(path) or path.name).lstrip("._-")[:64] or "model"


def _check_scheduler(pipeline: ComposedPipeline, checkpoint: Checkpoint) -> None:
    """Check that the standard denoising stage supports the scheduler.

    Raises CheckpointError for an unsupported scheduler, and PipelineError if the pipeline assigns no scheduler to that
    stage.
    """
    for stage in (stage for service in pipeline.services for stage in service.stages):
        if stage.implementation == DENOISING_STAGE:
            if SCHEDULER not in stage.modules:
                raise PipelineError(f"{stage.contract.name}: role {SCHEDULER!r} has no module; the stage requires one")
            check_scheduler(checkpoint.modules[stage.modules[SCHEDULER]][1], checkpoint.config_of(SCHEDULER))


def _check_defaults(params: type[SamplingParams], checkpoint: Checkpoint) -> None:
    """Check that a request with the checkpoint's own defaults is valid. Raises CheckpointError."""
    try:
        params.build({"prompt": ""}, checkpoint)
    except InvalidInput as error:
        raise CheckpointError(f"{checkpoint.path / SAMPLING_DEFAULTS_FILE}: {error.message}") from None
