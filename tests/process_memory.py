"""Peak memory of this process during a block, including native allocations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_FORGET_PEAK = "5"  # proc(5): resets the peak resident set to the current value


@dataclass
class Growth:
    """Peak resident set minus the resident set before the block. `peak_bytes` is set when the block ends."""

    peak_bytes: int = 0


@contextmanager
def measured_growth() -> Iterator[Growth]:
    """Measure the resident set of this process during the block. Blocks must not be nested."""
    growth = Growth()
    _CLEAR.write_text(_FORGET_PEAK)
    before = resident_bytes()
    try:
        yield growth
    finally:
        growth.peak_bytes = max(_resident("VmHWM") - before, 0)


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return _resident("VmRSS")


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) << 10
