"""Exports memory and utilization of a worker's GPUs, read at each scrape.

torch reads both from NVML through nvidia-ml-py. A read enqueues no work on a GPU, and creates no CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import pynvml
import torch

from common.logs import get_logger
from common.metrics import GPU_MEMORY_TOTAL_BYTES, GPU_MEMORY_USED_BYTES, GPU_UTILIZATION_RATIO

_PERCENT = 100
_ERRORS = (pynvml.NVMLError, RuntimeError)

_log = get_logger(__name__)


def gpu_indices(device: torch.device, count: int) -> range:
    """Indices of the worker's GPUs on this host: `count` GPUs from `device`; empty for a CPU."""
    first = device.index or 0
    return range(first, first + count) if device.type == "cuda" else range(0)


def export_gpus(indices: Iterable[int]) -> None:
    """Export the metrics of these GPUs. Logs a metric that NVML cannot read, for example on a MIG slice."""
    for index in indices:
        total = torch.cuda.get_device_properties(index).total_memory
        GPU_MEMORY_TOTAL_BYTES.labels(str(index)).set(total)
        for gauge, read in ((GPU_MEMORY_USED_BYTES, _memory_used), (GPU_UTILIZATION_RATIO, _utilization)):
            try:
                read(index)
            except _ERRORS as error:
                (metric,) = gauge.describe()
                _log.warning("GPU metric not exported", gpu=index, metric=metric.name, error=error)
            else:
                gauge.labels(str(index)).set_function(partial(_or_nan, read, index))


def _memory_used(index: int) -> float:
    return float(torch.cuda.device_memory_used(index))


def _utilization(index: int) -> float:
    return torch.cuda.utilization(index) / _PERCENT


def _or_nan(read: Callable[[int], float], index: int) -> float:
    """Read a metric. Returns NaN if NVML fails, so that the scrape still exports all other metrics."""
    try:
        return read(index)
    except _ERRORS:
        return math.nan
