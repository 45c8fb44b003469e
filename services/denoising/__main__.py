"""Runs the denoising service: in this process, or as a worker group, of which this is then the agent or a rank."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from models.catalog import ServedModel
from models.loader import check_approximation
from models.warm_up import WarmUp
from services.denoising.joining import Place
from services.denoising.launcher import launch
from services.denoising.rank import run_rank
from services.denoising.settings import SERVICE, DenoisingSettings, check_attention, check_group
from services.worker import run_service, serve

SETTINGS = DenoisingSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    return run_service(SERVICE, SETTINGS, _run, argv)


def _run(model: ServedModel, settings: DenoisingSettings, flags: Sequence[str]) -> int:
    check_approximation(model, model.service(SERVICE), settings.approximation)
    check_attention(model, settings)
    warm_up = WarmUp.parse(model, settings.warm_up)
    if settings.degrees.world_size == 1:
        asyncio.run(serve(SERVICE, model, settings, warm_up=warm_up))
        return 0
    check_group(model, settings)
    place = Place.from_environment(os.environ)
    return launch(settings, flags) if place is None else run_rank(model, settings, place, warm_up)


if __name__ == "__main__":
    sys.exit(main())
