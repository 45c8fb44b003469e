"""Undoes what a test does to the process: modules that it imported, and outcomes of kernel packages it recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from models.kernels.packages import KernelChoice, record


@contextmanager
def forgotten(*packages: str) -> Iterator[None]:
    """Reimport the packages inside, and remove them afterwards; forget the outcomes of trials."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        record(KernelChoice(), None)

    forget()
    try:
        yield
    finally:
        forget()
