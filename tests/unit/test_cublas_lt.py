"""GEMMs with bias and GELU into a slice of columns, against a fake cuBLASLt with column-major layouts.

tests/bench/kernel_energy.py runs the real library, which needs a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from models.kernels import cublas_lt, trials

CUDA_R_32F, CUDA_R_16BF = 0, 14
CUBLAS_COMPUTE_32F = 68
CUBLAS_OP_T = 1
DESCRIPTION = SimpleNamespace(TRANSA=3, EPILOGUE=7, BIAS_POINTER=8, BIAS_DATA_TYPE=26)


class ColumnMajorLibrary:
    """The functions of nvmath.bindings.cublasLt that linear_into() calls, on host memory."""

    MatmulDescAttribute = DESCRIPTION
    MatmulPreferenceAttribute = SimpleNamespace(MAX_WORKSPACE_BYTES=1)
    Epilogue = SimpleNamespace(BIAS=4, GELU_BIAS=36)

    def __init__(self) -> None:
        self.number = count(1)
        self.layouts: dict[int, tuple[int, int, int, int]] = {}
        self.operations: dict[int, dict[int, int]] = {}
        self.choices = 0

    def create(self) -> int:
        return next(self.number)

    def get_matmul_desc_attribute_dtype(self, attribute: int) -> type[np.generic]:
        return np.uint64 if attribute == DESCRIPTION.BIAS_POINTER else np.int32

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        assert (compute, scale) == (CUBLAS_COMPUTE_32F, CUDA_R_32F)
        operation = next(self.number)
        self.operations[operation] = {}
        return operation

    def matmul_desc_set_attribute(self, operation: int, attribute: int, address: int, size: int) -> None:
        raw = ctypes.string_at(address, size)
        self.operations[operation][attribute] = int.from_bytes(raw, "little")

    def matmul_desc_destroy(self, operation: int) -> None:
        del self.operations[operation]

    def matrix_layout_create(self, kind: int, rows: int, columns: int, leading_dimension: int) -> int:
        layout = next(self.number)
        self.layouts[layout] = (kind, rows, columns, leading_dimension)
        return layout

    def matmul_preference_create(self) -> int:
        return next(self.number)

    def matmul_preference_set_attribute(self, preference: int, attribute: int, address: int, size: int) -> None:
        del preference
        assert attribute == self.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
        assert ctypes.string_at(address, size) == bytes(8)

    def matmul_preference_destroy(self, preference: int) -> None:
        del preference

    def MatmulHeuristicResult(self, size: int) -> SimpleNamespace:  # noqa: N802
        assert size == 1
        return SimpleNamespace(ptr=next(self.number), state=0)

    def matmul_algo_get_heuristic(self, *args: Any) -> None:
        self.choices += 1
        ctypes.c_int32.from_address(args[-1]).value = 1

    def matmul(self, *args: Any) -> None:
        _, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, _, _, workspace, _ = args
        attributes = self.operations[operation]
        assert attributes[DESCRIPTION.TRANSA] == CUBLAS_OP_T
        assert attributes[DESCRIPTION.BIAS_DATA_TYPE] == CUDA_R_16BF
        assert (c, c_layout, workspace) == (d, d_layout, 0)
        assert [ctypes.c_float.from_address(each).value for each in (alpha, beta)] == [1.0, 0.0]
        weight, x, out = (self._stored(*each) for each in ((a, a_layout), (b, b_layout), (d, d_layout)))
        bias = _memory(attributes[DESCRIPTION.BIAS_POINTER], len(weight))
        result = x.float() @ weight.float().T + bias.float()
        is_gelu = attributes[DESCRIPTION.EPILOGUE] == self.Epilogue.GELU_BIAS
        out.copy_(gelu(result, approximate="tanh") if is_gelu else result)

    def _stored(self, address: int, layout: int) -> Tensor:
        """Transposed view (columns, rows) of the column-major matrix at `address`."""
        kind, rows, columns, leading_dimension = self.layouts[layout]
        assert kind == CUDA_R_16BF
        elements = _memory(address, (columns - 1) * leading_dimension + rows)
        return elements.as_strided((columns, rows), (leading_dimension, 1))


def _memory(address: int, size: int) -> Tensor:
    return torch.frombuffer((ctypes.c_uint16 * size).from_address(address), dtype=torch.bfloat16)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ColumnMajorLibrary:
    fake = ColumnMajorLibrary()
    bindings = ModuleType("nvmath.bindings")
    bindings.cublasLt = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvmath", ModuleType("nvmath"))
    monkeypatch.setitem(sys.modules, "nvmath.bindings", bindings)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for cached in (cublas_lt._plan, cublas_lt._handle):
        cached.cache_clear()
    return fake


@pytest.mark.parametrize("is_gelu", [False, True])
def test_linear_into_writes_a_slice_of_columns(library: ColumnMajorLibrary, is_gelu: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 24, dtype=torch.bfloat16)[:, :16]
    weight, bias = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(8, dtype=torch.bfloat16)
    out = torch.zeros(5, 32, dtype=torch.bfloat16)
    for _ in range(2):
        cublas_lt.linear_into(x, weight, bias, out[:, 8:16], gelu=is_gelu)
    expected = linear(x.float(), weight.float(), bias.float())
    expected = gelu(expected, approximate="tanh") if is_gelu else expected
    torch.testing.assert_close(out[:, 8:16].float(), expected, rtol=1e-2, atol=1e-2)
    assert not out[:, :8].any()
    assert not out[:, 16:].any()
    assert library.choices == 1, "the kernel of a shape must be chosen once"
    assert not library.operations


@pytest.mark.usefixtures("library")
def test_the_start_up_trial_passes() -> None:
    (pair,) = trials._try_nvmath(torch.device("cpu"))
    trials._compare(*pair)


def test_a_shape_without_a_kernel_raises(library: ColumnMajorLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "matmul_algo_get_heuristic", lambda *_: None)
    x, weight, bias = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((5, 16), (8, 16), (8,)))
    with pytest.raises(RuntimeError, match="no GEMM of 5 x 16 by 16 x 8"):
        cublas_lt.linear_into(x, weight, bias, torch.zeros(5, 8, dtype=torch.bfloat16))
    assert not library.operations


def test_cpu_tensors_are_not_supported() -> None:
    x = torch.zeros(2048, 16, dtype=torch.bfloat16)
    assert not cublas_lt.can_multiply(x, x[:8])


@pytest.mark.parametrize(("offset", "expected"), [(0, True), (128, True), (8, False), (64, False)])
def test_matrices_must_be_aligned_to_256_bytes(monkeypatch: pytest.MonkeyPatch, offset: int, expected: bool) -> None:
    """256 bytes are 128 elements of bfloat16. A slice at an offset that is not a multiple of 128 is refused."""
    monkeypatch.setattr(cublas_lt, "can_load", lambda *_: True)
    monkeypatch.setattr(cublas_lt, "is_usable", lambda _: True)
    buffer = torch.zeros(2048 * 256 + 256, dtype=torch.bfloat16)
    aligned = buffer[-buffer.data_ptr() % 256 // 2 :][: 2048 * 256].view(2048, 256)
    x, weight = aligned[:, :128], aligned[:8, :128]
    assert cublas_lt.can_multiply(x, weight, aligned[:, offset:]) is expected
    assert cublas_lt.can_multiply(aligned[:, offset:], weight) is expected
