"""TensorLeaf of the codec for torch: converts tensors to bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from common.errors import InvalidInput
from fleet.v1 import artifacts_pb2 as pb

_NUMBERS: dict[torch.dtype, pb.Dtype.ValueType] = {
    torch.float32: pb.DTYPE_FLOAT32,
    torch.bfloat16: pb.DTYPE_BFLOAT16,
    torch.float16: pb.DTYPE_FLOAT16,
    torch.int64: pb.DTYPE_INT64,
    torch.uint8: pb.DTYPE_UINT8,
    torch.float64: pb.DTYPE_FLOAT64,
    torch.int32: pb.DTYPE_INT32,
    torch.bool: pb.DTYPE_BOOL,
}
_DTYPES = {number: dtype for dtype, number in _NUMBERS.items()}


class TorchTensors:
    """Encodes tensors on any device, and decodes to CPU tensors. Bit patterns are preserved, including NaNs."""

    def view(self, path: str, value: Any) -> tuple[pb.Dtype.ValueType, Sequence[int], memoryview]:
        """Return Dtype, shape and bytes of a tensor: a view if it is contiguous and on the CPU, else a copy."""
        if not isinstance(value, Tensor):
            raise InvalidInput(f"{path} is a {type(value).__name__}, not a tensor", field=path)
        if value.dtype not in _NUMBERS:
            raise InvalidInput(f"{path} has dtype {value.dtype}, which has no Dtype on the wire", field=path)
        dense = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _NUMBERS[value.dtype], tuple(value.shape), dense.numpy().data

    def restore(self, path: str, tensor: pb.Tensor, buffer: bytearray | mmap) -> Tensor:
        """Return a tensor with the beginning of `buffer` as storage. Raises InvalidInput for invalid bool bytes."""
        dtype, count = _DTYPES[tensor.dtype], tensor.byte_size
        if count == 0:
            return torch.empty(tuple(tensor.shape), dtype=dtype)
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=count)
        if dtype is torch.bool and flat.max().item() > 1:
            raise InvalidInput(f"{path} contains a byte that is neither 0 nor 1, but is of DTYPE_BOOL", field=path)
        return flat.view(dtype).reshape(tuple(tensor.shape))


TORCH = TorchTensors()
"""The TensorLeaf of processes with torch."""
