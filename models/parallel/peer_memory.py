"""Memory that the GPUs of one host write to from each other, and operations on it that streams run without kernels.

Copies are done by the copy engines, and flags are written and awaited by the streams' own front ends: no multiprocessor
takes part, and CUDA graphs take all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.parallel.mesh import Axis


@dataclass(frozen=True)
class PeerMemory:
    """As many bytes on each rank of an axis.

    `own` (bytes,) is this rank's, `addresses` are those of all ranks as this rank's device sees them, and `mapping`
    keeps the others' in its address space.
    """

    own: Tensor
    addresses: Sequence[int]
    mapping: object = None


def share_memory(axis: Axis, device: torch.device, size: int) -> PeerMemory:
    """Memory of `size` bytes on each rank, zero at first; all ranks make theirs together."""
    # Private to torch as yet: should it change, only what needs it shall not import.
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(size, dtype=torch.uint8, device=device).zero_()
    mapping = symmetric_memory.rendezvous(own, axis.group)  # type: ignore[arg-type]
    # No rank writes before all have zeros.
    mapping.barrier()
    torch.cuda.synchronize(device)
    return PeerMemory(own, mapping.buffer_ptrs, mapping)


class CopyStreams:
    """The current stream of a device, and one beside it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The priority lets its copies start before what else is ready to run.
        self.side: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def current(self) -> Any:
        """The stream that layers compute in."""
        return torch.cuda.current_stream(self._device)

    def await_stream(self, waiting: Any, other: Any) -> None:
        """Let a stream wait for all that another one has been given so far."""
        waiting.wait_stream(other)

    def copy_rows(self, stream: Any, to: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy `rows` of `width` bytes, `pitch` bytes apart, between two addresses of any device."""
        # Comes with torch for CUDA.
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _check(runtime.cudaMemcpy2DAsync(to, pitch, source, pitch, width, rows, kind, stream.cuda_stream))

    def write_flag(self, stream: Any, address: int, value: int) -> None:
        """Write 32 bits, after all that the stream has been given so far can be seen."""
        # Comes with torch for CUDA.
        from cuda.bindings import driver

        _check(driver.cuStreamWriteValue32(stream.cuda_stream, address, value, 0))

    def await_flag(self, stream: Any, address: int) -> None:
        """Let a stream wait until a flag is 1."""
        # Comes with torch for CUDA.
        from cuda.bindings import driver

        equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        _check(driver.cuStreamWaitValue32(stream.cuda_stream, address, 1, equal))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]):
        raise RuntimeError(f"a copy between GPUs failed: {result[0].name}")
