"""Entry point of the coordinator: `fleet serve coordinator`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from common.logs import get_logger, setup_logging
from common.package_guard import COORDINATOR_PACKAGES, check_versions
from common.rpc.fleet_server import stop_signals
from common.rpc.grpcio_patch import check_server
from common.settings import load_settings
from common.telemetry import start_metrics
from common.tracing import exporting
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.setting_readers import READERS
from services.start_up import run_program

SETTINGS = CoordinatorSettings

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Exit code 0 after a graceful stop, 2 for a wrong configuration, else 1."""
    flags = sys.argv[1:] if argv is None else argv
    return run_program("coordinator", lambda: _run(flags), flags)


def _run(flags: Sequence[str]) -> int:
    check_versions(*COORDINATOR_PACKAGES)
    settings = load_settings(SETTINGS, flags, prog="fleet serve coordinator", readers=READERS)
    setup_logging("coordinator", level=settings.log_level, form=settings.log_format)
    registry = load_registry(settings.plugins)
    models = [open_model(reference, registry) for reference in settings.model]
    return asyncio.run(_serve(models, settings))


async def _serve(models: Sequence[ServedModel], settings: CoordinatorSettings) -> int:
    await check_server()
    metrics = None if settings.metrics_port is None else start_metrics(settings.metrics_port)
    with exporting("coordinator"):
        await _serve_until_signal(models, settings)
    if metrics is not None:
        metrics.stop()
    return 0


async def _serve_until_signal(models: Sequence[ServedModel], settings: CoordinatorSettings) -> None:
    async with stop_signals() as stop:
        coordinator = await start_coordinator(models, settings)
        _log.announce("listens", address=coordinator.address)
        await stop.wait()
        await coordinator.stop(settings.grace_seconds)


if __name__ == "__main__":
    sys.exit(main())
