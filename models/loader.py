"""Builds the stages of one service; loads only the modules that the stages use."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoint import kind_of
from common.errors import CheckpointError, InvalidInput
from common.logs import get_logger
from common.stage import PipelineStage
from configs.approximation import EXACT, Approximation
from configs.pipeline_configs.base import DenoisingConfig, PipelineConfig, PreparationConfig
from models.composition import SCHEDULER
from models.dits.base import DiffusionTransformer
from models.experts import SwappedExpert, swapped_experts
from models.kernels.backends import facts as kernel_facts
from models.kernels.float8 import check_float8
from models.layers.linear import quantize_linears
from models.parallel.mesh import Degrees
from models.registry import resolve
from models.runtime import Runtime
from models.schedulers.trial import try_schedules
from models.sources import own_digest, sources_digest

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ServiceSpec, StageSpec
    from models.catalog import ServedModel, ServedVariant


_log = get_logger(__name__)

# Longest error text of another library, in characters; longer texts are shortened.
MAX_ERROR_CHARS = 400

ModuleLoader = Callable[["Checkpoint", str, torch.device, torch.dtype], Any]
"""Loads a module of a checkpoint for inference: checkpoint, name in model_index.json, device, dtype.

Raises CheckpointError.

The loader of a class in the config's parallel_modules also takes `mesh` (a WorkerMesh or None) and loads this rank's
shard.
"""


def load_variants(
    model: ServedModel,
    service: ServiceSpec,
    runtime: Runtime,
) -> dict[str, list[PipelineStage[Any, Any]]]:
    """Load the service's stages for each variant that uses the service, keyed by variant name.

    Each module is loaded once, to the runtime's device, and shared by all variants. With a mesh, every rank of the
    worker group calls this function and then each stage's run() with equal inputs; all ranks get equal outputs.

    Raises CheckpointError, InvalidInput for parallel degrees that the model does not support, and InvalidInput or
    FailedPrecondition for an approximation that the model or the device does not support.
    """
    return _load_variants(model, service, model.variants_of(service.service), runtime)


def load_stages(
    model: ServedModel, service: ServiceSpec, runtime: Runtime, *, variant: str = ""
) -> list[PipelineStage[Any, Any]]:
    """Load the service's stages for one variant, by default the first. Raises the errors of load_variants()."""
    pairs = [pair for pair in model.variants_of(service.service) if variant in ("", pair[0].name)][:1]
    (stages,) = _load_variants(model, service, pairs, runtime).values()
    return stages


# transformers changes process-wide defaults, such as the default dtype, while it loads a model. Services in one process
# therefore load one model at a time.
_LOADING = threading.Lock()


def _load_variants(
    model: ServedModel, service: ServiceSpec, pairs: Sequence[tuple[ServedVariant, ServiceSpec]], runtime: Runtime
) -> dict[str, list[PipelineStage[Any, Any]]]:
    if runtime.mesh is not None:
        check_parallel(model, service, runtime.mesh.degrees)
    check_approximation(model, service, runtime.approximation)
    modules = _Modules(model.checkpoint, runtime)
    with _LOADING:
        return {variant.name: _build_stages(model, variant, spec, modules, runtime) for variant, spec in pairs}


def _build_stages(
    model: ServedModel, variant: ServedVariant, spec: ServiceSpec, modules: _Modules, runtime: Runtime
) -> list[PipelineStage[Any, Any]]:
    config_class: type[PipelineConfig] = resolve(variant.pipeline_config)
    config = config_class.from_checkpoint(model.checkpoint)
    if runtime.approximation.linear_dtype == "float8":
        check_float8(runtime.device, runtime.dtype)
    loaded = modules.load(spec.modules, config, _experts(spec, config) if runtime.swap_experts else ())
    if isinstance(config, PreparationConfig) and (name := spec.module_of(SCHEDULER)) is not None:
        try_schedules(model.checkpoint, variant.sampling_params, config, name, loaded[name])
    denoisers = (DiffusionTransformer, SwappedExpert)
    if runtime.approximation != EXACT and not any(isinstance(each, denoisers) for each in loaded.values()):
        pipeline = model.checkpoint.pipeline_name
        raise InvalidInput(
            f"approximation: {runtime.approximation} is not supported by {pipeline}, which has no transformer in "
            f"{spec.service}; linear_dtype same and step_cache_threshold 0 work"
        )
    return [_construct(stage, config, runtime, loaded) for stage in spec.stages]


def _construct(
    spec: StageSpec, config: PipelineConfig, runtime: Runtime, loaded: Mapping[str, Any]
) -> PipelineStage[Any, Any]:
    modules = {role: loaded[name] for role, name in spec.modules.items()}
    stage: PipelineStage[Any, Any] = resolve(spec.implementation)(config, runtime, modules)
    return stage.bind(spec.contract)


def _experts(spec: ServiceSpec, config: PipelineConfig) -> tuple[str, ...]:
    """Names of the service's experts. Raises InvalidInput for a model with a single transformer."""
    if not isinstance(config, DenoisingConfig) or len(config.transformers) < 2:
        raise InvalidInput(
            "swap_experts: True is not supported by a model with one transformer; False works", field="swap_experts"
        )
    modules = [spec.module_of(role) for role in config.transformers]
    return tuple(name for name in modules if name is not None)


class _Modules:
    """Loads each module of a service once for all variants."""

    def __init__(self, checkpoint: Checkpoint, runtime: Runtime) -> None:
        self._checkpoint = checkpoint
        self._runtime = runtime
        self._loaded: dict[str, Any] = {}
        self._loaders: dict[str, str] = {}

    def load(self, names: Iterable[str], config: PipelineConfig, swapped: Sequence[str] = ()) -> dict[str, Any]:
        """Load modules by name. The device holds one expert of `swapped` at a time.

        Raises CheckpointError, and TypeError if two variants use different loaders for a module.
        """
        if not self._loaded.keys() >= set(swapped):
            self._loaded |= swapped_experts(swapped, lambda name: self._load(name, config, cache=False))
        return {name: self._load(name, config) for name in names}

    def _load(self, name: str, config: PipelineConfig, *, cache: bool = True) -> Any:
        loader = config.module_loaders.get(self._checkpoint.modules.get(name, ("", ""))[1], "")
        if self._loaders.setdefault(name, loader) != loader:
            message = f"{type(config).__name__} loads {name} by {loader!r}, and another variant by"
            raise TypeError(f"{message} {self._loaders[name]!r}; variants share modules")
        if name not in self._loaded:
            module = load_module(self._checkpoint, name, config, self._runtime)
            if isinstance(module, DiffusionTransformer) and self._runtime.approximation.linear_dtype == "float8":
                quantize_linears(module, module.block_linears)
            if not cache:
                return module
            self._loaded[name] = module
        return self._loaded[name]


def check_parallel(model: ServedModel, service: ServiceSpec, degrees: Degrees) -> None:
    """Check that the model's parallel plan supports the degrees. Raises InvalidInput."""
    for variant, spec in model.variants_of(service.service):
        config: type[PipelineConfig] = resolve(variant.pipeline_config)
        classes = {model.checkpoint.modules[name][1] for name in spec.modules if name in model.checkpoint.modules}
        if degrees.world_size > 1 and not classes & config.parallel_modules:
            raise InvalidInput(
                f"degrees: {degrees} are not supported, as {model.checkpoint.pipeline_name} has no parallel plan for "
                f"{service.service}; tp, ulysses, ring and cfg of 1 work"
            )
        for axis in ("tp", "ulysses", "ring"):
            if degrees.of(axis) > 1 and axis not in config.parallel_axes:
                message = f"{axis}: {degrees.of(axis)} is not 1; the parallel plan of {model.checkpoint.pipeline_name}"
                raise InvalidInput(f"{message} has the axes {', '.join(config.parallel_axes)}", field=axis)


def check_approximation(model: ServedModel, service: ServiceSpec, approximation: Approximation) -> None:
    """Check that the loops of all variants support the step cache, if it is on. Raises InvalidInput."""
    threshold = approximation.step_cache_threshold
    for variant, _ in model.variants_of(service.service):
        config: type[PipelineConfig] = resolve(variant.pipeline_config)
        if threshold > 0 and issubclass(config, DenoisingConfig) and not config.has_step_cache:
            message = f"step_cache_threshold: {threshold} is not 0"
            raise InvalidInput(
                f"{message}; {model.checkpoint.pipeline_name} has no step cache", field="step_cache_threshold"
            )


def load_module(checkpoint: Checkpoint, name: str, config: PipelineConfig, runtime: Runtime) -> Any:
    """Load one module by the loader of its class. Raises CheckpointError for a class without a loader."""
    if name not in checkpoint.modules:
        raise CheckpointError(f"{checkpoint.name}: model_index.json has no {name}")
    _, class_name = checkpoint.modules[name]
    if reference := config.module_loaders.get(class_name):
        function = resolve(reference)
        parallel = class_name in config.parallel_modules
        loader: ModuleLoader = partial(function, mesh=runtime.mesh) if parallel else function
    elif class_name in _LOADERS:
        loader = _LOADERS[class_name]
    else:
        kind = kind_of(class_name)
        supported = ", ".join(sorted(each for each in {*_LOADERS, *config.module_loaders} if kind_of(each) == kind))
        raise CheckpointError(f"{name}: class {class_name} is not supported; supported: {supported}")
    if files := checkpoint.weight_files(name):
        variant = checkpoint.weight_variant(name) or "none"
        _log.info("weight files selected", module=name, variant=variant, files=[file.name for file in files])
    return loader(checkpoint, name, runtime.device, config.dtype_of(name, runtime.dtype))


def load_tokenizer(checkpoint: Checkpoint, name: str, *_: object) -> Any:
    """Load a tokenizer, or a processor with a tokenizer, by its own library. Raises CheckpointError."""
    return _load_tokenizer(checkpoint, name)


def load_auto_tokenizer(checkpoint: Checkpoint, name: str, *_: object) -> Any:
    """Load a tokenizer by AutoTokenizer, ignoring the class in model_index.json. Raises CheckpointError."""
    try:
        return _load_tokenizer(checkpoint, name, "AutoTokenizer")
    except CheckpointError as error:
        files = "tokenizer.json and tokenizer_config.json"
        raise CheckpointError(f"{error.message}; the tokenizer is read from {files}") from error


def _load_tokenizer(checkpoint: Checkpoint, name: str, class_name: str = "") -> Any:
    try:
        return _from_pretrained(checkpoint, name, {}, class_name)
    except Exception as error:
        # The tokenizers library raises bare Exception for inconsistent files.
        if type(error) is not Exception:
            raise
        raise CheckpointError(f"{name}: {checkpoint.modules[name][1]} cannot be loaded: {error}") from error


def _load_image_processor(checkpoint: Checkpoint, name: str, *_: object) -> Any:
    """Load the Pillow processor: torchvision's processor resizes with a different kernel."""
    return _from_pretrained(checkpoint, name, {}, class_name=f"{checkpoint.modules[name][1].removesuffix('Pil')}Pil")


def _load_image_processor_of(image_processor: str) -> ModuleLoader:
    """Return a loader of a processor's image processor; its tokenizer is a separate module."""
    return lambda checkpoint, name, *_: _from_pretrained(checkpoint, name, {}, class_name=image_processor)


def _load_scheduler(checkpoint: Checkpoint, name: str, *_: object) -> Any:
    return _from_pretrained(checkpoint, name, {})


def load_pretrained(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a whole module by its own library, frozen and in eval mode. Raises CheckpointError."""
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if (variant := checkpoint.weight_variant(name)) is not None:
        options["variant"] = variant
    module, info = _from_pretrained(checkpoint, name, options)
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(kind, ()))):
            raise CheckpointError(f"{name}: {kind.replace('_', ' ')}: {', '.join(keys[:3])} ({len(keys)} in all)")
    return module.to(device).requires_grad_(False).eval()


_LOADERS: Mapping[str, ModuleLoader] = {
    "AutoencoderKL": load_pretrained,
    "CLIPTextModel": load_pretrained,
    "CLIPImageProcessor": _load_image_processor,
    "CLIPImageProcessorPil": _load_image_processor,
    "CLIPTokenizer": load_tokenizer,
    "CLIPTokenizerFast": load_tokenizer,
    "CLIPVisionModel": load_pretrained,
    "CLIPVisionModelWithProjection": load_pretrained,
    "FlowMatchEulerDiscreteScheduler": _load_scheduler,
    "Qwen2_5_VLProcessor": _load_image_processor_of("Qwen2VLImageProcessorPil"),
    "Qwen2VLProcessor": _load_image_processor_of("Qwen2VLImageProcessorPil"),
    "Qwen2Tokenizer": load_tokenizer,
    "Qwen2TokenizerFast": load_tokenizer,
    "T5EncoderModel": load_pretrained,
    "T5Tokenizer": load_tokenizer,
    "T5TokenizerFast": load_tokenizer,
    "UMT5EncoderModel": load_pretrained,
    "UniPCMultistepScheduler": _load_scheduler,
}


def _from_pretrained(checkpoint: Checkpoint, name: str, options: Mapping[str, Any], class_name: str = "") -> Any:
    """Load a module by its own library from this directory only: no hub, no pickle, no progress bar."""
    class_name = class_name or checkpoint.modules[name][1]
    module = _module_of(checkpoint, name, class_name)
    importlib.import_module(f"{module.__name__.partition('.')[0]}.utils.logging").disable_progress_bar()
    cls = getattr(module, class_name)
    try:
        return cls.from_pretrained(checkpoint.path / name, local_files_only=True, **options)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, ImportError, AttributeError) as error:
        sentence = textwrap.shorten(str(error), MAX_ERROR_CHARS, placeholder=" ...")
        raise CheckpointError(f"{name}: {class_name} cannot be loaded: {sentence}") from error


def _module_of(checkpoint: Checkpoint, name: str, class_name: str) -> ModuleType:
    """Import the Python module of a checkpoint module's class.

    If model_index.json names a pipeline package as the library, such as "glm_image", the class is in that package of
    Diffusers or in transformers. Raises CheckpointError for an unsupported library.
    """
    library = checkpoint.modules[name][0]
    if library in ("diffusers", "transformers"):
        return importlib.import_module(library)
    package = f"diffusers.pipelines.{library}"
    if library.isidentifier() and importlib.util.find_spec(package) is not None:
        module = importlib.import_module(package)
        return module if hasattr(module, class_name) else importlib.import_module("transformers")
    raise CheckpointError(f"{name}: library {library!r} is not supported; supported: diffusers and transformers")


def numerics_fingerprint(
    device: torch.device,
    dtype: torch.dtype,
    degrees: Degrees | None = None,
    approximation: Approximation = EXACT,
    *,
    uses_kernels: bool = True,
    shares_memory: bool = False,
    plugins: Iterable[Path] = (),
) -> str:
    """Hash of everything besides weights and inputs that determines a stage's output bytes.

    Returns 32 hexadecimal digits. Workers with equal hashes and equal weights compute equal bytes for equal inputs. The
    hash covers the processor, the device, `dtype`, `approximation`, library versions, and the source code of `models`,
    `configs` and `plugins` (directories of further families).

    `degrees` None: one rank. Parallel degrees are included because sums over ranks round differently. `shares_memory`
    is included because ranks that share memory attend to all keys at once. With `uses_kernels`, versions and trial
    results of the optional kernel packages are included on a GPU.
    """
    facts = [
        platform.machine(),
        device.type,
        str(dtype),
        str(degrees or Degrees()),
        str(approximation),
        f"shared memory {shares_memory}",
        f"sources {own_digest()}",
        *(f"plugin {sources_digest([directory])}" for directory in plugins),
        *(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "diffusers", "transformers")),
    ]
    if device.type == "cuda":
        facts += [
            torch.cuda.get_device_name(device),
            f"cuda {torch.version.cuda}",
            f"cudnn {torch.backends.cudnn.version()}",  # type: ignore[no-untyped-call]
            f"tf32 {torch.backends.cuda.matmul.allow_tf32}",
            *(kernel_facts() if uses_kernels else ()),
        ]
    else:
        facts += [torch.backends.cpu.get_cpu_capability(), f"threads {torch.get_num_threads()}"]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
