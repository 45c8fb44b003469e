"""Stage services that need no code beyond services.worker and a settings class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.worker import main_for
from services.worker_settings import CachingSettings, DecodingSettings, KernelSettings, WarmUpSettings, WorkerSettings

SETTINGS: Mapping[str, type[WorkerSettings]] = {
    "before_denoising": WarmUpSettings,
    "decoding": DecodingSettings,
    "image_encoding": KernelSettings,
    "latent_preparation": WorkerSettings,
    "text_encoding": CachingSettings,
}
"""Settings classes by service."""


def main(service: str, argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    return main_for(service, SETTINGS[service])(argv)
