"""Chooses between the fused kernels of a device and plain PyTorch, which defines what they compute."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

from torch import Tensor


@lru_cache
def is_installed(package: str) -> bool:
    """Whether an optional package for GPUs is there to import."""
    return importlib.util.find_spec(package) is not None


def kernels_for(x: Tensor) -> ModuleType | None:
    """models.layers.triton_kernels for tensors on CUDA; None elsewhere, where PyTorch's own operators do the same."""
    if not x.is_cuda:
        return None
    # Triton is there only where torch has CUDA.
    from models.layers import triton_kernels

    return triton_kernels
