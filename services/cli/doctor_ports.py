"""Checks of a running coordinator's other ports: health checks, metrics and KEDA scaler."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from common.rpc.address import is_local, socket_path
from common.rpc.probe import health_fault
from services.cli.doctor_results import Result, ok, warning
from services.cli.doctor_settings import OTHER_PORTS, addresses_of

_WILDCARDS = ("0.0.0.0", "[::]", "*", "")
_SECONDS = 3.0
_MOST_BYTES = 1 << 20
_OWN_METRIC = b"fleet_requests_total"


def check_endpoint_ports(endpoint: str, values: Mapping[str, Any]) -> Iterator[Result]:
    """One result per port of the coordinator settings, on the host of `endpoint`.

    Skips ports bound to the loopback interface of another host, because this host cannot reach them.
    """
    for name, address in reached_addresses(endpoint, values).items():
        if name == "metrics_port":
            fault, advice = _metrics_fault(address), "check the coordinator's log and its metrics_port"
            right = "serves the metrics of a coordinator"
        elif name == "scaler_listen" and values.get("tls_ca"):
            fault, advice = _connection_fault(address), "check the coordinator's log and its scaler_listen"
            right = "accepts connections; callers need a client certificate"
        else:
            fault, advice = health_fault(address), f"check the coordinator's log and its {name}"
            right = "is ready"
        if fault:
            yield warning(
                "endpoint ports", f"{name}: {address} {fault}", f"{advice}, and the firewalls between both hosts"
            )
        else:
            yield ok("endpoint ports", f"{name}: {address} {right}")


def reached_addresses(endpoint: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The addresses at which this host can reach the configured ports, by name of the setting."""
    host = "127.0.0.1" if endpoint.startswith("unix:") else endpoint.rpartition(":")[0]
    found = {}
    for name, address in addresses_of(values).items():
        if name not in OTHER_PORTS or (is_local(address) and not is_local(endpoint)):
            continue
        bound, _, port = address.rpartition(":")
        found[name] = f"{host}:{port}" if bound in _WILDCARDS else address
    return found


def _metrics_fault(address: str) -> str:
    """The fault of the metrics endpoint at HOST:PORT, or "". Uses no proxy, like Prometheus by default."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_SECONDS)
    try:
        connection.request("GET", "/metrics")
        reply = connection.getresponse()
        text = reply.read(_MOST_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return _no_answer(error)
    finally:
        connection.close()
    return "" if reply.status == HTTPStatus.OK and _OWN_METRIC in text else "serves no coordinator metrics"


def _connection_fault(address: str) -> str:
    """The fault of a connection attempt to an address, or ""."""
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_SECONDS)
                connection.connect(str(socket_path(address)))
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except OSError as error:
        return _no_answer(error)
    return ""


def _no_answer(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return f"does not answer: {reason}"
