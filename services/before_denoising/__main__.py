"""Runs the before_denoising service."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from models.catalog import ServedModel
from models.warm_up import WarmUp
from services.worker import run_service, serve
from services.worker_settings import WarmUpSettings

SERVICE = "before_denoising"
SETTINGS = WarmUpSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    return run_service(SERVICE, SETTINGS, _run, argv)


def _run(model: ServedModel, settings: WarmUpSettings, _: Sequence[str]) -> int:
    warm_up = WarmUp.parse(model, settings.warm_up, service=SERVICE)
    asyncio.run(serve(SERVICE, model, settings, warm_up=warm_up))
    return 0


if __name__ == "__main__":
    sys.exit(main())
