"""Credentials for a running fleet: TLS and API key, from flags and environment variables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.rpc.tls import channel_credentials, read_authority, read_identity
from common.settings import SettingsError
from services.cli.options import ACCESS_FLAGS


@dataclass(frozen=True)
class Access:
    """TLS credentials (None: plain text) and API key (empty: not sent) of a client."""

    credentials: grpc.ChannelCredentials | None = None
    api_key: str = ""


IN_THE_CLEAR = Access()
"""Plain text without an API key, for connections on one host."""


def access_of(args: argparse.Namespace, environ: Mapping[str, str] | None = None) -> Access:
    """Read the credentials from flags, else from FLEET_* variables. Raises InvalidInput for unusable TLS files."""
    environ = os.environ if environ is None else environ
    given = {name: vars(args)[name] or environ.get(f"FLEET_{name.upper()}") or None for name in ACCESS_FLAGS}
    api_key = given["api_key"] or ""
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise SettingsError(
            "--api-key: the key is not printable ASCII without spaces; letters and digits work", field="api_key"
        )
    files = {name: Path(path) for name in ("tls_ca", "tls_cert", "tls_key") if (path := given[name])}
    identity = read_identity(files.get("tls_cert"), files.get("tls_key"))
    if "tls_ca" in files:
        return Access(channel_credentials(read_authority(files["tls_ca"]), identity), api_key)
    if given["tls"] in (True, "1", "true", "yes") or identity is not None:
        return Access(channel_credentials(None, identity), api_key)
    return Access(None, api_key)
