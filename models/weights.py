"""Loads safetensors into modules, strictly by name, one tensor (or this rank's shard of it) at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import CheckpointError
from common.logs import get_logger
from models.layers.linear import absent_biases, join_all_weights
from models.parallel.shards import Shard, parameter_shards

_log = get_logger(__name__)

# Supported dtypes of stored weights, by safetensors' names.
_DTYPES = ("F64", "F32", "F16", "BF16")


class Weights:
    """The tensors of a module's safetensors files, by name. A context manager; tensors are read on demand.

    Raises CheckpointError, which names the module, for invalid files and for a tensor name in two files.
    """

    def __init__(self, module: str, files: Sequence[Path]) -> None:
        self._module = module
        self._files = files
        self._stack = ExitStack()
        self._sources: dict[str, Any] = {}
        self.bytes_read = 0

    def __enter__(self) -> Weights:
        """Open the files."""
        with ExitStack() as stack:
            for path in self._files:
                try:
                    source = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{self._module}: {path} cannot be read: {error}") from error
                for name in source.keys():  # noqa: SIM118  (not a mapping: it has no iterator)
                    if name in self._sources:
                        raise CheckpointError(f"{self._module}: {name} is in two files; {path.name} is the second")
                    self._sources[name] = source
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._sources.clear()
        self._stack.close()

    def check(self, expected: dict[str, tuple[int, ...]], unused: Sequence[str] = ()) -> None:
        """Check that names and shapes are as expected and that dtypes are supported. Raises CheckpointError.

        Names that contain one of `unused` are ignored.
        """
        self._refuse("lacks", sorted(expected.keys() - self._sources.keys()))
        unknown = sorted(self._sources.keys() - expected.keys())
        self._refuse("has unknown weights", [name for name in unknown if not _contains(name, unused)])
        for name, shape in expected.items():
            part = self._sources[name].get_slice(name)
            if tuple(part.get_shape()) != shape:
                raise CheckpointError(f"{self._module}: {name}: shape {part.get_shape()} is not {list(shape)}")
            if part.get_dtype() not in _DTYPES:
                supported = ", ".join(_DTYPES)
                raise CheckpointError(
                    f"{self._module}: {name}: dtype {part.get_dtype()} is not supported; supported: {supported}"
                )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read a tensor, or only a slice of it, from disk. Raises CheckpointError."""
        try:
            part: Tensor = self._sources[name].get_slice(name)[index or ...]
        except SafetensorError as error:
            raise CheckpointError(f"{self._module}: {name} cannot be read: {error}") from error
        self.bytes_read += part.nbytes
        return part

    def load(self, name: str, shard: Shard | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Load a tensor, or a shard of it, to the device. For a GPU, the host holds one chunk of it at a time."""
        if shard is None:
            return self.read(name).to(device, dtype)
        parts = [self.read(name, index).to(device, dtype) for index in shard.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=shard.dim)

    def _refuse(self, problem: str, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{self._module} {problem}: {', '.join(names[:3])}{more}")


def load_module(
    module: nn.Module,
    name: str,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    *,
    keep_float32: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> None:
    """Load weights into a module built on the meta device, freeze it and set eval mode.

    The files must contain every parameter under its own name and unsharded shape, and no other names except names
    that contain one of `unused`. Biases that are absent from checkpoints become zeros. Names that contain one of
    `keep_float32` are loaded as float32, other names as `dtype`. Raises CheckpointError.
    """
    began = time.monotonic()
    shards = parameter_shards(module)
    absent = absent_biases(module)
    own_shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    zeros = {key: torch.zeros(own_shapes[key], device=device, dtype=dtype) for key in absent}
    shapes = {key: shape for key, shape in own_shapes.items() if key not in absent}
    shapes |= {key: shard.whole_shape(shapes[key]) for key, shard in shards.items() if key in shapes}
    with Weights(name, files) as weights:
        weights.check(shapes, unused)
        state = {
            key: weights.load(key, shards.get(key), device, torch.float32 if _contains(key, keep_float32) else dtype)
            for key in shapes
        }
        gigabytes, seconds = weights.bytes_read / 1e9, time.monotonic() - began
    _log.info("weights read", module=name, gigabytes=gigabytes, seconds=seconds, device=device)
    module.load_state_dict(state | zeros, strict=True, assign=True)
    module.requires_grad_(False).eval()
    join_all_weights(module)


def _contains(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)
