"""GEMM by cuBLASLt, with bias and GELU in the epilogue.

Unlike PyTorch's GEMM with an epilogue, this module can write to columns of a wider tensor. It passes no workspace:
cuBLASLt then chooses kernels with a static tile schedule, which need no memset of a counter before each launch. The
first algorithm of the heuristics is used for each shape, so that workers with the same GPU give bit-identical results.

`nvmath.linalg.advanced.Matmul` is not used: its GPU time is the same (0.997 to 1.002 of this module's over 14 shapes on
an H200), but a call takes 1.3 times the host time, and one object cannot be shared by several threads.
"""

from __future__ import annotations

from ctypes import addressof, c_float
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.kernels.gemm_support import ALIGNMENT, MIN_ROWS, can_load
from models.kernels.packages import is_usable

_ASSUMED_ALIGNMENT = 256
"""Alignment of a matrix in bytes that cuBLASLt's heuristics assume by default."""

_BFLOAT16 = 14
"""CUDA_R_16BF of cudaDataType_t."""

_FLOAT32 = 0
"""CUDA_R_32F of cudaDataType_t."""

_COMPUTE_FLOAT32 = 68
"""CUBLAS_COMPUTE_32F of cublasComputeType_t."""

_TRANSPOSED = 1
"""CUBLAS_OP_T of cublasOperation_t."""

_ONE = c_float(1)
"""Factor alpha of the matrix multiplication."""

_ZERO = c_float(0)
"""Factor beta of the previous contents of the output."""


def can_multiply(x: Tensor, weight: Tensor, out: Tensor | None = None) -> bool:
    """Whether linear_into() is usable and pays off: aligned bfloat16 on a GPU, at least MIN_ROWS rows."""
    matrices = (x, weight) if out is None else (x, weight, out)
    if not (can_load(*matrices) and len(x) >= MIN_ROWS and is_usable("nvmath-python")):
        return False
    return all(matrix.data_ptr() % _ASSUMED_ALIGNMENT == 0 for matrix in matrices)


def linear_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, gelu: bool = False) -> None:
    """out = x @ weight.T + bias, followed by GELU (tanh approximation) if `gelu`.

    All tensors are bfloat16: x (M, K), weight (N, K), bias (N,), out (M, N); accumulation is in float32. The row
    strides of x and out are arbitrary. Raises RuntimeError where cuBLASLt has no algorithm.
    """
    library = _library()
    rows, size = x.shape
    plan = _plan(x.device.index, rows, len(weight), size, x.stride(0), out.stride(0), gelu)
    operation = _operation(gelu, bias.data_ptr())
    try:
        library.matmul(
            _handle(x.device.index),
            operation,
            addressof(_ONE),
            weight.data_ptr(),
            plan.weight,
            x.data_ptr(),
            plan.x,
            addressof(_ZERO),
            out.data_ptr(),
            plan.out,
            out.data_ptr(),
            plan.out,
            plan.result.ptr,
            0,
            0,
            torch.cuda.current_stream(x.device).cuda_stream,
        )
    finally:
        library.matmul_desc_destroy(operation)


class _Plan(NamedTuple):
    """Layouts and algorithm of the GEMM of one shape. BLAS layouts are column-major: all matrices are transposed."""

    weight: int
    x: int
    out: int
    result: Any


@lru_cache(maxsize=1024)
def _plan(device: int, rows: int, width: int, size: int, x_stride: int, out_stride: int, gelu: bool) -> _Plan:
    library = _library()
    weight_layout, x_layout, out_layout = (
        library.matrix_layout_create(_BFLOAT16, *shape)
        for shape in ((size, width, size), (size, rows, x_stride), (width, rows, out_stride))
    )
    # The heuristics use only the alignment of the bias pointer.
    operation, preference = _operation(gelu, ALIGNMENT), library.matmul_preference_create()
    result, found = library.MatmulHeuristicResult(1), np.zeros(1, np.int32)
    layouts = (weight_layout, x_layout, out_layout, out_layout)
    try:
        none = np.zeros(1, np.uint64)
        limit = library.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
        library.matmul_preference_set_attribute(preference, limit, none.ctypes.data, none.nbytes)
        library.matmul_algo_get_heuristic(
            _handle(device), operation, *layouts, preference, 1, result.ptr, found.ctypes.data
        )
    finally:
        library.matmul_preference_destroy(preference)
        library.matmul_desc_destroy(operation)
    if not found[0] or int(result.state):
        raise RuntimeError(f"cuBLASLt has no GEMM of {rows} x {size} by {size} x {width}")
    return _Plan(*layouts[:3], result)


def _library() -> Any:
    # An optional package for GPUs.
    from nvmath.bindings import cublasLt

    return cublasLt


@lru_cache(maxsize=16)
def _handle(device: int) -> int:
    with torch.cuda.device(device):
        handle: int = _library().create()
        return handle


def _operation(gelu: bool, bias: int) -> int:
    """Descriptor of a GEMM with a transposed first operand and the bias at address `bias`. The caller destroys it."""
    library = _library()
    attribute, epilogue = library.MatmulDescAttribute, library.Epilogue
    operation: int = library.matmul_desc_create(_COMPUTE_FLOAT32, _FLOAT32)
    _set(library, operation, attribute.TRANSA, _TRANSPOSED)
    _set(library, operation, attribute.EPILOGUE, epilogue.GELU_BIAS if gelu else epilogue.BIAS)
    _set(library, operation, attribute.BIAS_DATA_TYPE, _BFLOAT16)
    _set(library, operation, attribute.BIAS_POINTER, bias)
    return operation


def _set(library: Any, operation: int, attribute: Any, value: int) -> None:
    buffer = np.array([value], dtype=library.get_matmul_desc_attribute_dtype(attribute))
    library.matmul_desc_set_attribute(operation, attribute, buffer.ctypes.data, buffer.nbytes)
