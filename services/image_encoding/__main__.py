"""Runs the image_encoding service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.worker import main_for
from services.worker_settings import KernelSettings

SETTINGS = KernelSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    return main_for("image_encoding", SETTINGS)(argv)


if __name__ == "__main__":
    sys.exit(main())
