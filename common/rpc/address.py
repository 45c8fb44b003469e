"""Listen addresses of servers, and the addresses under which clients reach them."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from common.errors import FailedPrecondition

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_LOOPBACK_NAMES = ("localhost", "ip6-localhost")
_WILDCARDS = ("0.0.0.0", "[::]", "*", "")
_LONGEST_SOCKET_PATH = 107  # bytes, size of sun_path in sockaddr_un without the terminator


def check_listenable(listen: str) -> None:
    """Raise FailedPrecondition with the reason if an address cannot be bound.

    The error of gRPC has no reason, and gRPC writes several lines to stderr.
    """
    try:
        if listen.startswith("unix:"):
            _check_socket_path(socket_path(listen))
        else:
            _check_port(listen)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FailedPrecondition(f"cannot listen on {listen}: {reason}", field="listen") from None


def _check_socket_path(path: Path) -> None:
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise OSError(f"the path has more than {_LONGEST_SOCKET_PATH} bytes")
    if not path.parent.is_dir():
        raise OSError(f"there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"the directory {path.parent} is not writable")
    if path.exists():
        if not path.is_socket():
            raise OSError("a file with this path exists")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError("another process listens on it")


def _check_port(listen: str) -> None:
    host, colon, port = listen.rpartition(":")
    if not (colon and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise OSError("an address is HOST:PORT with a port from 0 to 65535, or unix:PATH")
    name = None if host in _WILDCARDS else host.strip("[]")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        name, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[:1]:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def bound_address(listen: str, port: int) -> str:
    """Return the listen address with the bound port, which the system has selected if `listen` has port 0."""
    if listen.startswith("unix:"):
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def advertised_address(bound: str, towards: str) -> str:
    """Return the address under which other hosts reach a server that is bound to a wildcard address.

    It is the local address of the route to `towards`, a URL. No packet is sent: connecting a datagram socket only
    selects a route.
    """
    host, _, port = bound.rpartition(":")
    if bound.startswith("unix:") or host not in _WILDCARDS:
        return bound
    target = urlsplit(towards)
    for family, kind, protocol, _, address in _resolve(target.hostname, target.port):
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0])
        return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
    return f"127.0.0.1:{port}"


def _resolve(host: str | None, port: int | None) -> list[Any]:
    if not host:
        return []
    try:
        return socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)
    except socket.gaierror:
        return []


def socket_path(listen: str) -> Path:
    """Return PATH of unix:PATH or unix://PATH."""
    return Path(listen.removeprefix("unix:").removeprefix("//"))


def target_of(address: str) -> str:
    """Return the gRPC target of HOST:PORT or unix:PATH.

    A target is a URI: %, #, ? and non-ASCII characters of a path are percent-encoded.
    """
    if not address.startswith("unix:"):
        return address
    return f"unix:{quote(os.fsencode(socket_path(address)))}"


def _host_of(address: str) -> str:
    """Return HOST of HOST:PORT, without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_local(address: str) -> bool:
    """Return whether an address is a Unix socket or on the loopback interface."""
    host = _host_of(address)
    if address.startswith("unix:") or host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_variable(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the environment variable that makes gRPC use a proxy for an address; empty if none does.

    The variables and their precedence are those of gRPC, which supports only the lower-case names.
    """
    if is_local(address):
        return ""
    host = _host_of(address)
    excluded = environ.get("no_grpc_proxy") or environ.get("no_proxy") or ""
    if any(host.endswith(suffix) for each in excluded.split(",") if (suffix := each.strip())):
        return ""
    return next((name for name in _PROXY_VARIABLES if environ.get(name)), "")
