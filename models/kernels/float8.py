"""Linear layers that multiply 8-bit floats (e4m3), which a GPU does twice as fast as bfloat16.

Weights have a scale for each output, activations one for each token, found anew in every call: the largest magnitude
of the row becomes the largest e4m3 number. Products are summed in float32 and scaled back, once for each output.
Where there is no such hardware, PyTorch's operators define what is computed: the same values, widened.
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
    """x (rows, size) as float8 (rows, size) and the float32 scale (rows, 1) of each row: x is about values * scale."""
    return _QUANTIZATION.for_device_of(x)(x)


@_QUANTIZATION.register("torch")
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    most = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE)
    # Divided as a kernel does it: torch computes number / tensor as a multiplication by the reciprocal.
    return (x.float() * (torch.full_like(most, LARGEST) / most)).to(FLOAT8), most / LARGEST


@_QUANTIZATION.register("triton")
def _quantize_rows_by_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.quantize_rows(x)


def float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times float8 weights (N, K) with a scale (N,) of their rows, plus bias (N,): (..., N) of x's type."""
    rows = x.reshape(-1, x.shape[-1])
    return _multiply(rows, weight, scale, bias).view(*x.shape[:-1], len(weight))


def write_float8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same of x (rows, K) into out (rows, N)."""
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
    """By the library's GEMM with scales of rows and columns. Its result is contiguous bfloat16."""
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
    """Refuse a device or an element type that float8 GEMM does not work with, before anything is loaded.

    Raises FailedPrecondition, InvalidInput. On a CPU they are computed widened, which is for tests: it is slow.
    """
    if device.type != "cuda":
        return
    if (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY:
        has, needs = (".".join(map(str, each)) for each in (capability, _MIN_CAPABILITY))
        name = torch.cuda.get_device_name(device)
        message = f"linear_dtype float8 needs a GPU of compute capability {needs} or higher; {name} has {has}"
        raise FailedPrecondition(message, field=_FIELD)
    if dtype != torch.bfloat16:
        message = f"linear_dtype float8 goes with dtype bfloat16 on CUDA, not with {str(dtype).removeprefix('torch.')}"
        raise InvalidInput(message, field=_FIELD)


def check_sizes(path: str, sizes: Iterable[int], device: torch.device) -> None:
    """Refuse a layer of other sizes than CUDA's float8 GEMM takes. Raises InvalidInput."""
    if device.type == "cuda" and any(size % _MULTIPLE for size in sizes):
        given = " x ".join(map(str, sizes))
        message = f"linear_dtype float8 needs layers whose sizes are multiples of {_MULTIPLE}; {path} is {given}"
        raise InvalidInput(message, field=_FIELD)
