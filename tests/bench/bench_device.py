"""Device time and device memory, for benchmarks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def now(device: torch.device) -> float:
    """Synchronize the device; returns the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def milliseconds(run: Callable[[], object], *, calls: int = 5, rounds: int = 1) -> float:
    """Median CUDA-event time of a call in ms; a round has `calls` calls without synchronization."""
    spent = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        spent.append(float(begin.elapsed_time(end)) / calls)
    return statistics.median(spent)


def empty(device: torch.device) -> None:
    """Release cached GPU memory to other processes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype in the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
