"""TLS between the processes of the fleet, and for its clients.

Within the fleet, connections use mutual TLS with one certificate authority. The name in a certificate is the role of
its process: workers serve only peers named `coordinator`, and coordinators call only peers named `worker`; settings
change these names. Peers with other certificates of the authority can only call a worker's health checks and
reflection. Changed files are reloaded and apply to new handshakes. A change does not affect whether client
certificates are required.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import grpc

from common.errors import InvalidInput, PermissionDenied
from common.settings import setting
from common.watched import WatchedFiles

T = TypeVar("T")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """Certificate of a process, and the certificate authority that it trusts. Files are PEM."""

    tls_cert: Path | None = setting(None, help="certificate with its chain; without it, connections are not encrypted")
    tls_key: Path | None = setting(None, help="private key of tls_cert, without a password")
    tls_ca: Path | None = setting(None, help="certificate authority of coordinators and workers; enables mutual TLS")
    reload_seconds: float = setting(2.0, help="interval in seconds at which certificate and key files are checked")
    health_listen: str = setting("", help="second address for unencrypted health checks, if TLS is enabled")


@dataclass(frozen=True)
class Identity:
    """A certificate with its chain, and its private key, in PEM."""

    certificate: bytes
    key: bytes


def read_identity(cert: Path | None, key: Path | None, *, name: str = "tls") -> Identity | None:
    """Read the files of the settings NAME_cert and NAME_key. Returns None if neither is set.

    Raises InvalidInput if only one is set, a file is unreadable or not PEM, or the key does not match the certificate.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, lacking = ("key", "cert") if cert is None else ("cert", "key")
        raise InvalidInput(f"{name}_{given} is set without {name}_{lacking}", field=f"{name}_{lacking}")
    identity = Identity(_read(cert, f"{name}_cert"), _read(key, f"{name}_key"))
    try:
        # With an empty password, an encrypted key raises an error instead of prompting on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        mismatch = isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH"
        reason = "the key is of another certificate" if mismatch else "they are not a certificate and its key in PEM"
        raise InvalidInput(f"{cert} and {key} cannot be used: {reason}", field=f"{name}_cert") from None
    return identity


def read_authority(ca: Path, *, name: str = "tls_ca") -> bytes:
    """Read the certificates of an authority. Raises InvalidInput if the file is unreadable or has no certificate."""
    text = _read(ca, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise InvalidInput(f"{name}: {ca} contains no certificate in PEM", field=name) from None
    return text


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{name}: {path} cannot be read: {error.strerror}", field=name) from None


@dataclass(frozen=True)
class ServerIdentity:
    """TLS configuration of a server. `clients` is the authority of required client certificates, or None."""

    identity: Identity
    clients: bytes | None = None


@dataclass(frozen=True)
class Mutual:
    """Configuration of a process for mutual TLS within the fleet."""

    identity: Identity
    authority: bytes

    def server_identity(self) -> ServerIdentity:
        """Return the TLS configuration of a server that requires client certificates."""
        return ServerIdentity(self.identity, self.authority)

    def channel(self) -> grpc.ChannelCredentials:
        """Return channel credentials for servers with mutual TLS."""
        return channel_credentials(self.authority, self.identity)


def mutual_of(settings: TlsSettings) -> Mutual | None:
    """Return the configuration of mutual TLS; None without `tls_ca`. Raises InvalidInput if a file is not set."""
    identity = read_identity(settings.tls_cert, settings.tls_key)
    if settings.tls_ca is None:
        return None
    if identity is None:
        raise InvalidInput(
            "tls_ca is set without tls_cert and tls_key, which mutual TLS requires; set all three", field="tls_cert"
        )
    return Mutual(identity, read_authority(settings.tls_ca))


def watch_mutual(settings: TlsSettings) -> WatchedFiles[Mutual] | None:
    """Return the configuration of mutual TLS, which is reloaded when files change; None without `tls_ca`."""
    if mutual_of(settings) is None:
        return None

    def read() -> Mutual:
        mutual = mutual_of(settings)
        if mutual is None:
            raise AssertionError("settings do not change")
        return mutual

    files = (settings.tls_cert, settings.tls_key, settings.tls_ca)
    return watch(settings, files, read, "tls_cert, tls_key and tls_ca")


def watch(settings: TlsSettings, files: Sequence[Path | None], read: Callable[[], T], name: str) -> WatchedFiles[T]:
    """Return the value of `read`, which is reloaded when one of the files that are set changes."""
    return WatchedFiles(
        [file for file in files if file is not None], read, check_seconds=settings.reload_seconds, name=name
    )


def server_credentials(shown: Callable[[], tuple[int, ServerIdentity]]) -> grpc.ServerCredentials:
    """Return server credentials. Each handshake calls `shown`, which returns a version and the TLS configuration."""
    version, first = shown()
    latest = [version]

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Return the changed configuration; None if it is unchanged. gRPC calls this on its own threads."""
        version, now = shown()
        if latest == [version]:
            return None
        latest[:] = [version]
        return _configuration(now)

    fetcher = cast(Callable[[], grpc.ServerCertificateConfiguration], changed)  # the type stub does not permit None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first), fetcher, require_client_authentication=first.clients is not None
    )


def mutual_credentials(tls: WatchedFiles[Mutual]) -> grpc.ServerCredentials:
    """Return credentials of a server that requires client certificates. Changed files are reloaded."""

    def shown() -> tuple[int, ServerIdentity]:
        version, mutual = tls.versioned()
        return version, mutual.server_identity()

    return server_credentials(shown)


def _configuration(shown: ServerIdentity) -> grpc.ServerCertificateConfiguration:
    pairs = [(shown.identity.key, shown.identity.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=shown.clients)


def channel_credentials(authority: bytes | None, identity: Identity | None = None) -> grpc.ChannelCredentials:
    """Return channel credentials. Without an authority, the root certificates of gRPC are trusted."""
    key, certificate = (identity.key, identity.certificate) if identity else (None, None)
    return grpc.ssl_channel_credentials(authority, key, certificate)


def peer_names(context: Context) -> tuple[str, ...]:
    """Return the subject alternative names of the peer's certificate, else its common name, else ()."""
    properties = context.auth_context() or {}
    names = properties.get("x509_subject_alternative_name") or properties.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "replace") for name in names)


class NamedPeers:
    """Authorizes peers whose certificate has one of the given names."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def __call__(self, context: Context) -> None:
        """Raise PermissionDenied for any other peer."""
        names = peer_names(context)
        if self._names.isdisjoint(names):
            shown = ", ".join(names) or "no name"
            raise PermissionDenied(f"a certificate for {shown} is not authorized to call this service")
