"""Runs the decoding service."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.worker import main_for
from services.worker_settings import DecodingSettings

SETTINGS = DecodingSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    return main_for("decoding", SETTINGS)(argv)


if __name__ == "__main__":
    sys.exit(main())
