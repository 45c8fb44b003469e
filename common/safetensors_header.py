"""Reads and validates the header of a safetensors file, without the safetensors library.

Layout: header length n (8 bytes, little-endian), n bytes of JSON, then the concatenated tensors. Source: the format
description at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError

_PREFIX = 8
_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (safetensors name), shape, and byte range [begin, end) within the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors by name in the order of their data. `raw` is the unparsed JSON; sizes are in bytes."""

    tensors: Mapping[str, TensorInfo]
    raw: bytes
    data_start: int
    file_size: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate a file's header. Raises CheckpointError for a truncated or malformed file."""
    try:
        with path.open("rb") as file:
            prefix = file.read(_PREFIX)
            length = int.from_bytes(prefix, "little")
            size = path.stat().st_size
            if len(prefix) < _PREFIX or length > min(_MAX_HEADER, size - _PREFIX):
                raise CheckpointError(_bad_prefix(path, prefix + file.read(len(_LFS_POINTER)), length, size))
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    header = SafetensorsHeader(_parse(path, raw), raw, _PREFIX + length, size)
    _check_extent(path, header)
    return header


def _bad_prefix(path: Path, head: bytes, length: int, size: int) -> str:
    if head.startswith(_LFS_POINTER):
        return f"{path} is a Git LFS pointer; fetch the file itself (git lfs pull)"
    return f"{path} is not a complete safetensors file: a header of {length} bytes does not fit in {size} bytes"


def _parse(path: Path, raw: bytes) -> dict[str, TensorInfo]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object")
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str() as dtype, "shape": [*shape], "data_offsets": [int() as begin, int() as end]}:
            pass
        case _:
            raise CheckpointError(f"{path}: the header's entry of {name} lacks dtype, shape or data_offsets")
    if dtype not in _BITS:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}; known dtypes are {', '.join(_BITS)}")
    if not all(type(extent) is int and extent >= 0 for extent in shape):
        raise CheckpointError(f"{path}: {name} has the invalid shape {shape}")
    if end - begin != math.prod(shape) * _BITS[dtype] // 8:
        raise CheckpointError(f"{path}: {name} is {dtype} {shape}, which does not have {end - begin} bytes")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_extent(path: Path, header: SafetensorsHeader) -> None:
    end = 0
    for name, tensor in header.tensors.items():
        if tensor.begin != end:
            raise CheckpointError(f"{path}: {name} starts at byte {tensor.begin} of the data instead of byte {end}")
        end = tensor.end
    if header.data_start + end != header.file_size:
        kind = "truncated" if header.data_start + end > header.file_size else "too long"
        raise CheckpointError(
            f"{path} is {kind}: its header describes {header.data_start + end} bytes, the file has {header.file_size}"
        )
