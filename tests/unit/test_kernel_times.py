"""Time of communication, and time without computation kernels, from trace events."""

from __future__ import annotations

from typing import Any

import pytest
from bench_kernel_times import times_of, union


def event(name: str, begin: float, end: float, category: str = "kernel") -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": begin, "dur": end - begin}


def test_union_counts_overlapping_intervals_once() -> None:
    assert union([(5.0, 7.0), (0.0, 4.0), (3.0, 6.0), (9.0, 10.0)]) == 8.0
    assert union([]) == 0.0


def test_communication_overlapped_by_a_kernel_is_not_exposed() -> None:
    events = [
        event("gemm", 0, 6000),
        event("ncclDevKernel_SendRecv", 4000, 8000),
        event("Memcpy PtoP (Device -> Device)", 7000, 9000, "gpu_memcpy"),
        event("softmax", 9000, 10000),
        {"cat": "cpu_op", "name": "nccl:all_to_all", "ts": 0, "dur": 90000},
        {"name": "process_name"},
    ]
    times = times_of(events, calls=2)
    assert (times.total, times.communication, times.exposed) == pytest.approx((5.0, 2.5, 1.5))
