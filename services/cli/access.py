"""How a command reaches a running fleet: TLS, and the key that says who is calling."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.rpc.tls import channel_credentials, read_authority, read_identity
from common.settings import FlagParser, SettingsError

ACCESS_FLAGS = ("tls", "tls_ca", "tls_cert", "tls_key", "api_key")


@dataclass(frozen=True)
class Access:
    """`credentials` None is plain text; an empty `api_key` is not sent."""

    credentials: grpc.ChannelCredentials | None = None
    api_key: str = ""


IN_THE_CLEAR = Access()
"""As within one machine."""


def add_access(parser: FlagParser) -> None:
    """Add the flags of a command that talks to a running fleet."""
    group = parser.add_argument_group("access", "each is also a variable, such as FLEET_TLS_CA or FLEET_API_KEY")
    group.add_argument("--tls", action="store_true", default=None, help="speak TLS; FLEET_TLS=1")
    group.add_argument("--tls-ca", metavar="FILE", help="speak TLS, and believe this authority (PEM)")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate to show, where the fleet asks for one")
    group.add_argument("--tls-key", metavar="FILE", help="private key of --tls-cert")
    group.add_argument("--api-key", metavar="KEY", help="who is calling; prefer the variable, which `ps` does not show")


def access_of(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Access:
    """The access that flags and environment describe, flags first. Raises InvalidInput for files that do not fit."""
    environ = os.environ if environ is None else environ
    given = {name: vars(args)[name] or environ.get(f"FLEET_{name.upper()}") or None for name in ACCESS_FLAGS}
    api_key = given["api_key"] or ""
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise SettingsError("--api-key must be of printable ASCII characters without blanks", field="api_key")
    files = {name: Path(path) for name in ("tls_ca", "tls_cert", "tls_key") if (path := given[name])}
    identity = read_identity(files.get("tls_cert"), files.get("tls_key"))
    if "tls_ca" in files:
        return Access(channel_credentials(read_authority(files["tls_ca"]), identity), api_key)
    if given["tls"] in (True, "1", "true", "yes") or identity is not None:
        return Access(channel_credentials(None, identity), api_key)
    return Access(None, api_key)
