"""`fleet serve SERVICE`: runs one service with its own flags. Containers run this command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from common.package_guard import COORDINATOR_PACKAGES, WORKER_PACKAGES, check_versions
from services.cli.options import BAD_INPUT, SUCCESS, let_threads_sleep

_STAGE_SERVICES = "services.stage_services"
_MODULES: Mapping[str, str] = {
    "before_denoising": _STAGE_SERVICES,
    "coordinator": "services.coordinator.__main__",
    "decoding": _STAGE_SERVICES,
    "denoising": "services.denoising.__main__",
    "image_encoding": _STAGE_SERVICES,
    "latent_preparation": _STAGE_SERVICES,
    "text_encoding": _STAGE_SERVICES,
}
"""The module of each service. It is imported when the service starts, because most modules import torch."""


def service_names() -> list[str]:
    """The names of all services, sorted."""
    return sorted(_MODULES)


def module_of(service: str) -> str:
    """The name of the module that runs a service."""
    return _MODULES[service]


def settings_class(service: str) -> type[Any]:
    """The settings class of a service."""
    settings = vars(importlib.import_module(_MODULES[service]))["SETTINGS"]
    cls: type[Any] = settings[service] if _MODULES[service] == _STAGE_SERVICES else settings
    return cls


def _main(service: str) -> Callable[[Sequence[str]], int]:
    run: Callable[..., int] = vars(importlib.import_module(_MODULES[service]))["main"]
    return partial(run, service) if _MODULES[service] == _STAGE_SERVICES else run


def main(argv: Sequence[str]) -> int:
    """Run the main() of the service."""
    names = service_names()
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        sys.stdout.write(
            f"usage: fleet serve SERVICE [flags]\n\nservices: {', '.join(names)}\n"
            "`fleet serve SERVICE --help` lists the flags of a service.\n"
        )
        return SUCCESS
    if name not in names:
        what = f"unknown service {name!r}" if name else "no service given"
        sys.stderr.write(f"fleet serve: {what}; services are {', '.join(names)}\n")
        return BAD_INPUT
    let_threads_sleep()
    # Checked before the import, because an import with an unsupported version may fail without naming the package.
    check_versions(*(COORDINATOR_PACKAGES if name == "coordinator" else WORKER_PACKAGES))
    return _main(name)(argv[1:])
