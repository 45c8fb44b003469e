"""How much memory this process has needed within a block, in C as in Python."""

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
    """`peak_bytes`: how far the resident set rose above what it was before, once the block has ended."""

    peak_bytes: int = 0


@contextmanager
def measured_growth() -> Iterator[Growth]:
    """Watch the resident set of this process. Not for blocks within each other."""
    growth = Growth()
    _CLEAR.write_text(_FORGET_PEAK)
    before = resident_bytes()
    try:
        yield growth
    finally:
        growth.peak_bytes = max(_resident("VmHWM") - before, 0)


def resident_bytes() -> int:
    """Memory that this process has now."""
    return _resident("VmRSS")


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) << 10
