"""GPU time of a step's communication, and time without computation kernels, from PyTorch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")

Span = tuple[float, float]
"""Begin and end, in microseconds of the profiler's clock."""


@dataclass(frozen=True)
class KernelTimes:
    """Milliseconds of one call on this rank's GPU.

    `communication` is the time in which a collective or a copy between GPUs runs. `exposed` is the part of the call in
    which no other kernel runs: communication that does not overlap, waits for other ranks, and gaps between kernels.
    """

    total: float
    communication: float
    exposed: float


def kernel_times(run: Callable[[], object], calls: int) -> KernelTimes:
    """Times of a call, as the mean of several calls."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return times_of(events, calls)


def times_of(events: Iterable[dict[str, Any]], calls: int) -> KernelTimes:
    """Times of a call from the events of a Chrome trace of `calls` calls."""
    work = [event for event in events if event.get("cat") in _GPU_WORK]
    spans = [(event, (float(event["ts"]), float(event["ts"]) + float(event["dur"]))) for event in work]
    communication = union(span for event, span in spans if is_communication(event))
    computation = union(span for event, span in spans if not is_communication(event))
    total = max(end for _, (_, end) in spans) - min(begin for _, (begin, _) in spans)
    return KernelTimes(*(each / calls / 1e3 for each in (total, communication, total - computation)))


def is_communication(event: dict[str, Any]) -> bool:
    """Whether an event of the trace is a NCCL kernel or a copy to another GPU."""
    name = str(event["name"]).lower()
    return "nccl" in name or "ptop" in name or "peer" in name


def union(spans: Iterable[Span]) -> float:
    """Length of the union of intervals."""
    return sum(end - begin for begin, end in _joined(spans))


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    joined: Span | None = None
    for begin, end in sorted(spans):
        if joined is None or begin > joined[1]:
            if joined is not None:
                yield joined
            joined = (begin, end)
        else:
            joined = (joined[0], max(joined[1], end))
    if joined is not None:
        yield joined
