"""Settings of the service that `fleet doctor` checks, and checks of its addresses and ports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import FailedPrecondition, FleetError
from common.rpc.address import check_listenable, is_local
from common.settings import load_settings
from common.state.store_server import StoreSettings
from services.cli.doctor_packages import WORKER_EXTRA_ABSENT, has_worker_extra
from services.cli.doctor_results import Result, error, ok, warning
from services.cli.serve import settings_class
from services.setting_readers import READERS

COORDINATOR = "coordinator"
OTHER_PORTS = ("health_listen", "scaler_listen", "metrics_port")
"""Settings of listen addresses and ports other than `listen`."""


@dataclass(frozen=True)
class ServiceSource:
    """The sources of a service's settings: FLEET_* variables, a TOML file and the URL of the store."""

    service: str = COORDINATOR
    config: str = ""
    redis: str = ""

    @cached_property
    def settings(self) -> Any:
        """The settings. Raises SettingsError for settings that the service rejects. Worker settings need torch."""
        flags = [*(("--config", self.config) if self.config else ()), *(("--redis", self.redis) if self.redis else ())]
        return load_settings(
            settings_class(self.service), flags, prog=f"fleet serve {self.service}", readers=READERS, environ=os.environ
        )

    @property
    def is_readable(self) -> bool:
        """Whether the packages of the service are installed here."""
        return self.service == COORDINATOR or has_worker_extra()

    @property
    def values(self) -> Mapping[str, Any]:
        """Settings by name; empty if they cannot be read, which check_settings() reports."""
        try:
            return vars(self.settings) if self.is_readable else {}
        except (FleetError, ImportError, OSError):
            return {}

    @property
    def store(self) -> StoreSettings:
        """The accepted store configurations; the defaults if the settings cannot be read."""
        values = self.values
        return StoreSettings(
            allow_eviction=values.get("allow_eviction", False), allow_data_loss=values.get("allow_data_loss", False)
        )


def check_settings(source: ServiceSource) -> Iterator[Result]:
    """Check that the service accepts its FLEET_* variables and its settings file."""
    if not source.is_readable:
        yield warning("settings", WORKER_EXTRA_ABSENT, "pip install 'diffusion-fleet[worker]'")
        return
    given = [*sorted(_variables(source.settings)), *([source.config] if source.config else [])]
    yield ok("settings", f"{source.service} accepts {', '.join(given) or 'its defaults: none of its variables is set'}")


def _variables(settings: object) -> Iterator[str]:
    names = {f"FLEET_{name.upper()}" for name in vars(settings)} | {"FLEET_CONFIG"}
    return (name for name, value in os.environ.items() if name in names and value)


def addresses_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The listen addresses of a service by setting. Omits addresses with port 0."""
    found = {name: str(values[name]) for name in ("listen", *OTHER_PORTS) if values.get(name)}
    if "metrics_port" in found:
        found["metrics_port"] = f"0.0.0.0:{found['metrics_port']}"
    if values.get("nnodes", 1) > 1 and values["node_rank"] == 0:
        found["rdzv_endpoint"] = str(values["rdzv_endpoint"])
    return {name: address for name, address in found.items() if not address.endswith(":0")}


def check_ports(source: ServiceSource, endpoint: str = "") -> Iterator[Result]:
    """Check that each address is free, or in use by the fleet at `endpoint`.

    check_endpoint_ports() verifies later that ports in use belong to that fleet.
    """
    addresses = addresses_of(source.values)
    runs_here = is_local(endpoint) and _port(endpoint) == _port(addresses.get("listen", ""))
    for name, address in addresses.items():
        if twins := [other for other in _before(name, addresses) if _port(addresses[other]) == _port(address)]:
            yield error("ports", f"{name} {address} has the port of {twins[0]}", f"set {name} to another port")
            continue
        try:
            check_listenable(address)
        except FailedPrecondition as failure:
            if runs_here and name in ("listen", *OTHER_PORTS):
                yield ok("ports", f"{name} {address} is in use by the fleet at --endpoint")
            else:
                yield warning(
                    "ports",
                    f"{name}: {failure.message}",
                    f"stop the process that listens there, or set {name} to a free address of this host",
                )
        else:
            yield ok("ports", f"{name} {address} is free")


def _before(name: str, names: Mapping[str, str]) -> Sequence[str]:
    listed = list(names)
    return listed[: listed.index(name)]


def _port(address: str) -> str:
    """The port of HOST:PORT; for unix:PATH, the address itself."""
    return address if address.startswith("unix:") else address.rpartition(":")[2]
