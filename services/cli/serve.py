"""`fleet serve SERVICE`: runs one service, with that service's own flags. Containers start this."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import services
from common.package_guard import COORDINATOR_PACKAGES, WORKER_PACKAGES, check_versions
from services.cli.options import BAD_INPUT, SUCCESS, let_threads_sleep

_NOT_SERVICES = ("cli",)


def service_names() -> list[str]:
    """The packages under services/ that can be run."""
    return [
        info.name for info in pkgutil.iter_modules(services.__path__) if info.ispkg and info.name not in _NOT_SERVICES
    ]


def settings_class(service: str) -> type[Any]:
    """The settings of a service: its dataclass, as its own main() fills it."""
    cls: type[Any] = vars(_program(service))["SETTINGS"]
    return cls


def _program(service: str) -> ModuleType:
    return importlib.import_module(f"services.{service}.__main__")


def main(argv: Sequence[str]) -> int:
    """Hand over to the service's own main()."""
    names = service_names()
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        sys.stdout.write(
            f"usage: fleet serve SERVICE [flags]\n\nservices: {', '.join(names)}\n"
            "`fleet serve SERVICE --help` tells a service's flags.\n"
        )
        return SUCCESS
    if name not in names:
        what = f"unknown service {name!r}" if name else "no service given"
        sys.stderr.write(f"fleet serve: {what}; services are {', '.join(names)}\n")
        return BAD_INPUT
    let_threads_sleep()
    # Before their import, which may fail for a wrong version with an error that names neither.
    check_versions(*(COORDINATOR_PACKAGES if name == "coordinator" else WORKER_PACKAGES))
    run: Callable[[Sequence[str]], int] = vars(_program(name))["main"]
    return run(argv[1:])
