"""Linear layers in float8 (e4m3), which has twice the GEMM throughput of bfloat16.

Weights have a scale per output channel; activations have a scale per token, computed in each call. A scale maps the
largest magnitude of the row to the largest e4m3 number. GEMM multiplies each output by both scales. On GPUs, GEMM uses
fast accumulation, which can be less precise than accumulation in float32. On CPUs the quantized values are converted to
float32 and multiplied by PyTorch's GEMM.

torchao's float8 linear layers are not used: on an H200 they take 1.3 to 3.1 times as long within a CUDA graph, and 1.1
times after torch.compile() (torchao 0.18, tests/bench/gemm_packages.py), at an equal error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.errors import FailedPrecondition, InvalidInput
from models.kernels.backends import Operation
from models.kernels.float8_format import FLOAT8, LARGEST, SMALLEST_MAGNITUDE

_QUANTIZATION: Operation[Callable[[Tensor], tuple[Tensor, Tensor]]] = Operation("quantization")

_MIN_CAPABILITY = (8, 9)
_MULTIPLE = 16
_FIELD = "linear_dtype"


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x (rows, size) to float8 values and float32 scales (rows, 1): x is about values * scale."""
    return _QUANTIZATION.for_device_of(x)(x)


@_QUANTIZATION.register("torch")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE)
    # full_like() makes this bit-identical to the Triton kernel, which divides: torch computes number / tensor as
    # number * reciprocal.
    return (x.float() * (torch.full_like(largest, LARGEST) / largest)).to(FLOAT8), largest / LARGEST


@_QUANTIZATION.register("triton")
def _quantize_rows_by_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.quantize_rows(x)


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) @ weight.T + bias (N,) for float8 weights (N, K) with scales (N,); (..., N) in x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return _multiply(rows, weight, scale, bias).view(*x.shape[:-1], len(weight))


def write_float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write float8_linear() of x (rows, K) to `out` (rows, N)."""
    if x.is_cuda and len(x) and out.is_contiguous():
        scaled_multiply(x, weight, scale, bias, out)
    else:
        out.copy_(_multiply(x, weight, scale, bias))


def _multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(weight))
    if x.is_cuda:
        return scaled_multiply(x, weight, scale, bias, x.new_empty(len(x), len(weight)))
    values, row_scale = quantize_rows(x)
    wide = linear(values.float() * row_scale, weight.float() * scale[:, None], None if bias is None else bias.float())
    return wide.to(x.dtype)


def scaled_multiply(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """float8_linear() by torch._scaled_mm, with scales per row and column. `out` must be contiguous bfloat16."""
    values, row_scale = quantize_rows(x)
    torch._scaled_mm(
        values,
        weight.t(),
        scale_a=row_scale,
        scale_b=scale[None],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=True,
        out=out,
    )
    return out


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Check that float8 GEMM supports the device and the dtype. Called before weights are loaded.

    Raises FailedPrecondition for the device and InvalidInput for the dtype. CPUs pass: their float32 computation is
    slow and meant for tests.
    """
    if device.type != "cuda":
        return
    if (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY:
        has, needs = (".".join(map(str, each)) for each in (capability, _MIN_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        message = f"linear_dtype: float8 needs a GPU of compute capability {needs} or higher; {name} has {has}"
        raise FailedPrecondition(message, field=_FIELD)
    if dtype != torch.bfloat16:
        given = str(dtype).removeprefix("torch.")
        message = f"linear_dtype: float8 does not support dtype {given} on CUDA; use dtype bfloat16"
        raise InvalidInput(message, field=_FIELD)


def check_sizes(path: str, sizes: Iterable[int], device: torch.device) -> None:
    """Check that CUDA's float8 GEMM supports the sizes of a layer. Raises InvalidInput."""
    if device.type == "cuda" and any(size % _MULTIPLE for size in sizes):
        given = " x ".join(map(str, sizes))
        message = f"linear_dtype: float8 needs layer sizes that are multiples of {_MULTIPLE}; {path} is {given}"
        raise InvalidInput(message, field=_FIELD)
