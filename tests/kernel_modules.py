"""Fresh imports of kernel packages in a test, and reset of the recorded kernel choice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from models.kernels.packages import KernelChoice, record


@contextmanager
def fresh_imports(*packages: str) -> Iterator[None]:
    """Unload the packages and reset the kernel choice, both before and after the block."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        record(KernelChoice(), None)

    forget()
    try:
        yield
    finally:
        forget()
