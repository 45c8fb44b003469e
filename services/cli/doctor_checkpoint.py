"""Checks of a checkpoint: weight files of every module, and their size relative to the device memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import INDEX_FILE, kind_of
from common.errors import CheckpointError, FleetError
from common.json_file import read_json
from common.safetensors_header import SafetensorsHeader, read_header
from common.weight_files import WeightFiles, read_weights
from models.catalog import ServedModel, open_model, shipped_models
from models.registry import load_registry
from services.cli.doctor_gpu import GpuFacts
from services.cli.doctor_results import CheckStatus, Result, error, ok, warning
from services.cli.generate import plugin_directories

SECONDS = 120.0
"""Timeout for reading the headers of a checkpoint, in seconds; network file systems are slow."""

_AGAIN = "download the named files again"
_GIB = 1 << 30
_MIB = 1 << 20
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB$", re.MULTILINE)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_FULL = 0.8
"""Fraction of the device memory above which weights leave too little memory for activations."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"})


def check_model(reference: str) -> Iterator[Result]:
    """Check the weight files of each module, and whether the fleet can serve the model."""
    directory = directory_of(reference)
    try:
        index = read_json(directory / INDEX_FILE) if directory.is_dir() else {}
    except CheckpointError as failure:
        yield error("checkpoint", failure.message, _AGAIN)
        return
    is_whole = True
    for module, entry in index.items():
        match entry:
            case [str() as library, str() as class_name] if module.isidentifier() and kind_of(class_name) is None:
                results = list(_module_results(directory / module, library))
                is_whole = is_whole and all(each.status is not CheckStatus.ERROR for each in results)
                yield from results
    if is_whole:
        yield from _model_results(reference)


def directory_of(reference: str) -> Path:
    """The directory of a reference: NAME of a shipped model, DIR, or NAME=DIR."""
    if reference in shipped_models():
        return open_model(reference, load_registry()).checkpoint.path
    name, separator, directory = reference.partition("=")
    return Path(directory if separator and "/" not in name else reference).expanduser()


def _model_results(reference: str) -> Iterator[Result]:
    """Check the files of the checkpoint that are not weights, and report variants that are not served."""
    try:
        model = opened(reference)
    except FleetError as failure:
        yield error("model", failure.message, "correct the checkpoint: no service starts with it")
        return
    for variant, reason in model.unserved.items():
        advice = "add the missing modules if requests need the variant"
        yield warning("model", f"{model.name}: variant {variant} is not served: {reason}", advice)
    checkpoint, services = model.checkpoint, ", ".join(each.service for each in model.services)
    yield ok(
        "model",
        f"{model.name} ({checkpoint.pipeline_name}), checkpoint {checkpoint.fingerprint[:12]}, services {services}",
    )


def opened(reference: str) -> ServedModel:
    """Open the model of a reference as services do. Raises CheckpointError and InvalidInput."""
    return open_model(reference, load_registry(plugin_directories()))


def _module_results(folder: Path, library: str) -> Iterator[Result]:
    """One result for the weights of a module, or one per faulty file."""
    if not folder.is_dir():
        yield error("checkpoint", f"{folder}, listed in {INDEX_FILE}, is missing", "download the folder again")
        return
    try:
        weights = read_weights(folder, library)
    except CheckpointError as failure:
        for fault in dict.fromkeys([failure.message, *_faults(folder)]):
            yield error("checkpoint", fault, _AGAIN)
        return
    if not weights.headers:
        # Modules of plugins may have no weights. open_model() refuses other modules without weights.
        return
    size = sum(map(_data_bytes, weights.headers.values()))
    files = "1 file" if len(weights.headers) == 1 else f"{len(weights.headers)} files"
    variant = f", variant {weights.variant}" if weights.variant else ""
    stated = _stated_bytes(weights)
    if stated is not None and stated != size:
        yield warning(
            "checkpoint",
            f"{weights.index} states total_size {stated}, and its files hold {size} bytes of tensors",
            "download the index and the files again from one revision",
        )
    else:
        yield ok("checkpoint", f"{folder.name}: {files}, {_size(size)} in total, complete{variant}")


def _faults(folder: Path) -> Iterator[str]:
    """The faults of all weight files of a folder, because read_weights() reports only the first fault."""
    for index in sorted(folder.glob("*.index*.json")):
        try:
            named = read_json(index).get("weight_map")
        except CheckpointError as failure:
            yield failure.message
            continue
        if isinstance(named, dict):
            for name in sorted({str(each) for each in named.values()}):
                if not (folder / name).exists():
                    yield f"{index} names {name}, which is missing"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except CheckpointError as failure:
            yield failure.message


def _data_bytes(header: SafetensorsHeader) -> int:
    return sum(each.end - each.begin for each in header.tensors.values())


def _stated_bytes(weights: WeightFiles) -> int | None:
    """The bytes in metadata.total_size of a shard index; None without an index or this field."""
    metadata = read_json(weights.index).get("metadata") if weights.index else None
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(size) if isinstance(size, int | float) else None


@dataclass(frozen=True)
class Device:
    """A GPU or host that holds weights: name, total and free bytes, bytes per floating-point element."""

    name: str
    total_bytes: int
    free_bytes: int
    element_bytes: int


def device_of(facts: GpuFacts, dtype: str = "auto") -> Device:
    """The GPU with the most memory, else this host. `dtype` is the setting of that name."""
    if not facts.gpus:
        return Device("this host", *host_memory(), 2 if dtype == "bfloat16" else 4)
    number, gpu = max(enumerate(facts.gpus), key=lambda each: each[1].total_bytes)
    return Device(f"cuda:{number}", gpu.total_bytes, gpu.free_bytes, 4 if dtype == "float32" else 2)


def fingerprints(references: Sequence[str]) -> dict[str, str]:
    """Checkpoint fingerprints by model name. Skips models that cannot be opened, which check_model() reports."""
    found = {}
    for reference in references:
        try:
            model = opened(reference)
        except FleetError:
            continue
        found[model.name] = model.checkpoint.fingerprint
    return found


def host_memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = _CGROUP_LIMIT) -> tuple[int, int]:
    """Total and available memory in bytes: the memory of the host, at most the limit of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    if meminfo.exists() and (match := _AVAILABLE.search(meminfo.read_text())):
        available = int(match[1]) << 10
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    return total, min(total, available)


def check_memory(reference: str, facts: GpuFacts, settings: Mapping[str, Any]) -> Iterator[Result]:
    """Compare the weights of each service with the memory of the largest GPU, else of this host.

    Uses dtype, tp and swap_experts of `settings`, the settings of the checked service. Yields nothing for a model that
    cannot be opened, which check_model() reports.
    """
    try:
        model = opened(reference)
    except FleetError:
        return
    device = device_of(facts, settings.get("dtype", "auto"))
    for spec in model.services:
        sizes = [_loaded_bytes(model, module, device.element_bytes) for module in spec.modules]
        if not any(sizes):
            continue
        need = sum(sizes)
        if spec.service == "denoising":
            need = (max(sizes) if settings.get("swap_experts") else need) // settings.get("tp", 1)
        yield _memory_result(spec.service, model.name, need, device)


def _memory_result(service: str, model: str, need: int, device: Device) -> Result:
    found = f"{service} of {model} needs {_size(need)} for weights; {device.name} has {_size(device.total_bytes)}"
    if need > device.total_bytes:
        advice = "use a GPU with more memory"
        if service == "denoising":
            advice = f"{advice}, tp over several GPUs, or swap_experts for a model with two experts"
        return error("memory", found, advice)
    if need > _FULL * device.total_bytes:
        return warning("memory", f"{found}, which leaves little for activations", "use a GPU with more memory")
    if need > device.free_bytes:
        advice = "stop the processes that use the rest, unless they are workers of this model"
        return warning("memory", f"{found}, of which {_size(device.free_bytes)} are free", advice)
    return ok("memory", found)


def _loaded_bytes(model: ServedModel, module: str, element_bytes: int) -> int:
    """Bytes of a module's weights on the device, with `element_bytes` per floating-point element."""
    return sum(
        element_bytes * math.prod(tensor.shape) if tensor.dtype in _FLOATS else tensor.end - tensor.begin
        for header in model.checkpoint.weight_headers(module).values()
        for tensor in header.tensors.values()
    )


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
