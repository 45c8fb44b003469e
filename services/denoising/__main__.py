"""Entry point of the denoising service: one process, or the agent or a rank of a worker group."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from common.package_guard import check_private_api
from models.catalog import ServedModel
from models.loader import check_approximation
from models.private_operators import COLLECTIVES
from models.warm_up import WarmUp
from services.denoising.elastic_api import ELASTIC
from services.denoising.joining import Place
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
    check_private_api(COLLECTIVES)
    if place is not None:
        return run_rank(model, settings, place, warm_up)
    check_private_api(ELASTIC)
    # Imported after the check, because this import fails with a torch version without the API in ELASTIC.
    from services.denoising.launcher import launch

    return launch(settings, flags)


if __name__ == "__main__":
    sys.exit(main())
