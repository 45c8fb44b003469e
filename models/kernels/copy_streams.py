"""Copies between GPUs and flags in GPU memory, as operations of CUDA streams.

Copy engines run the copies, and stream memory operations write the flags and wait for them. No operation occupies a
multiprocessor, and CUDA graphs can capture all of them.
"""

from __future__ import annotations

from typing import Any

import torch


class CopyStreams:
    """The current stream of a device, and a side stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The higher priority makes copies start before kernels that are ready to run.
        self.side: Any = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def current(self) -> Any:
        """The device's current stream, on which layers run."""
        return torch.cuda.current_stream(self._device)

    def await_stream(self, waiting: Any, other: Any) -> None:
        """Make stream `waiting` wait for all operations enqueued on stream `other` so far."""
        waiting.wait_stream(other)

    def copy_rows(self, stream: Any, to: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes, `pitch` bytes apart, from address `source` to address `to`.

        The addresses may be on different devices. Raises RuntimeError where CUDA refuses the copy.
        """
        # An optional package for GPUs.
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _check(runtime.cudaMemcpy2DAsync(to, pitch, source, pitch, width, rows, kind, stream.cuda_stream))

    def write_flag(self, stream: Any, address: int, value: int) -> None:
        """Write a 32-bit flag after all earlier operations of the stream and after their writes are visible.

        Raises RuntimeError where CUDA refuses the operation.
        """
        # An optional package for GPUs.
        from cuda.bindings import driver

        _check(driver.cuStreamWriteValue32(stream.cuda_stream, address, value, 0))

    def await_flag(self, stream: Any, address: int) -> None:
        """Make the stream wait until the 32-bit flag is 1. Raises RuntimeError where CUDA refuses the operation."""
        # An optional package for GPUs.
        from cuda.bindings import driver

        equal = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        _check(driver.cuStreamWaitValue32(stream.cuda_stream, address, 1, equal))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]):
        raise RuntimeError(f"CUDA stream operation failed: {result[0].name}")
