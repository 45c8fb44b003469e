"""TLS between the fleet's processes and towards its clients.

Within the fleet both ends show a certificate of one authority, and a name in it says what its holder may do: workers
serve whoever is called `coordinator`, coordinators call whoever is called `worker`. Who holds another certificate of
that authority may ask a worker for its health, and for nothing else. Files are read again when they change, and count
from the next handshake on; what asks for certificates of clients at the start does so to its end.
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
    """The certificate that a process shows, and the authority that it believes. Files are PEM."""

    tls_cert: Path | None = setting(None, help="certificate to show, with its chain; without one nothing is encrypted")
    tls_key: Path | None = setting(None, help="private key of tls_cert, without a password")
    tls_ca: Path | None = setting(None, help="authority of the fleet, which signed what coordinator and workers show")
    reload_seconds: float = setting(2.0, help="how often files of certificates and keys are looked at for changes")
    health_listen: str = setting("", help="another address, for health checks alone and in the clear, beside TLS")


@dataclass(frozen=True)
class Identity:
    """A certificate with its chain, and its key; both PEM."""

    certificate: bytes
    key: bytes


def read_identity(cert: Path | None, key: Path | None, *, name: str = "tls") -> Identity | None:
    """The certificate of two settings, NAME_cert and NAME_key; None where neither is set.

    Raises InvalidInput when one is missing, unreadable or not PEM, and when they are not a pair.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        given, lacking = ("key", "cert") if cert is None else ("cert", "key")
        raise InvalidInput(f"{name}_{given} is set without {name}_{lacking}", field=f"{name}_{lacking}")
    identity = Identity(_read(cert, f"{name}_cert"), _read(key, f"{name}_key"))
    try:
        # An empty password fails where a key has one, instead of asking for it on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        mismatch = isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH"
        reason = "the key is of another certificate" if mismatch else "they are not a certificate and its key in PEM"
        raise InvalidInput(f"{cert} and {key} cannot be used: {reason}", field=f"{name}_cert") from None
    return identity


def read_authority(ca: Path, *, name: str = "tls_ca") -> bytes:
    """The certificates of an authority. Raises InvalidInput when the setting's file is unreadable or has none."""
    text = _read(ca, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise InvalidInput(f"{name}: {ca} holds no certificate in PEM", field=name) from None
    return text


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{name}: {path} cannot be read: {error.strerror}", field=name) from None


@dataclass(frozen=True)
class ServerIdentity:
    """What a server shows. With `clients`, only holders of that authority's certificates get a connection."""

    identity: Identity
    clients: bytes | None = None


@dataclass(frozen=True)
class Mutual:
    """A process's side of mutual TLS within the fleet."""

    identity: Identity
    authority: bytes

    def server_identity(self) -> ServerIdentity:
        """What a server shows that talks to holders of the authority's certificates only."""
        return ServerIdentity(self.identity, self.authority)

    def channel(self) -> grpc.ChannelCredentials:
        """For calling such a server."""
        return channel_credentials(self.authority, self.identity)


def mutual_of(settings: TlsSettings) -> Mutual | None:
    """Mutual TLS, where all three files are set; None without `tls_ca`. Raises InvalidInput."""
    identity = read_identity(settings.tls_cert, settings.tls_key)
    if settings.tls_ca is None:
        return None
    if identity is None:
        raise InvalidInput(
            "tls_ca is set without tls_cert and tls_key, which this process has to show", field="tls_cert"
        )
    return Mutual(identity, read_authority(settings.tls_ca))


def watch_mutual(settings: TlsSettings) -> WatchedFiles[Mutual] | None:
    """The same, always as the files are now."""
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
    """What `read` makes of those of the files that are set, looked at as often as the settings say."""
    return WatchedFiles(
        [file for file in files if file is not None], read, check_seconds=settings.reload_seconds, name=name
    )


def server_credentials(shown: Callable[[], tuple[int, ServerIdentity]]) -> grpc.ServerCredentials:
    """For a server. Each handshake asks what is to be shown, and a number that tells whether that is something new."""
    version, first = shown()
    latest = [version]

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC on a thread of its own; None leaves things as they were."""
        version, now = shown()
        if latest == [version]:
            return None
        latest[:] = [version]
        return _configuration(now)

    fetcher = cast(Callable[[], grpc.ServerCertificateConfiguration], changed)  # the type stub does not know of None
    return grpc.dynamic_ssl_server_credentials(
        _configuration(first), fetcher, require_client_authentication=first.clients is not None
    )


def mutual_credentials(tls: WatchedFiles[Mutual]) -> grpc.ServerCredentials:
    """For a server that serves holders of the authority's certificates only. Reads changed files again."""

    def shown() -> tuple[int, ServerIdentity]:
        version, mutual = tls.versioned()
        return version, mutual.server_identity()

    return server_credentials(shown)


def _configuration(shown: ServerIdentity) -> grpc.ServerCertificateConfiguration:
    pairs = [(shown.identity.key, shown.identity.certificate)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=shown.clients)


def channel_credentials(authority: bytes | None, identity: Identity | None = None) -> grpc.ChannelCredentials:
    """For a client. Without an authority it believes those that gRPC ships."""
    key, certificate = (identity.key, identity.certificate) if identity else (None, None)
    return grpc.ssl_channel_credentials(authority, key, certificate)


def peer_names(context: Context) -> tuple[str, ...]:
    """The names in the peer's certificate: subject alternative names, else the common name; () without one."""
    properties = context.auth_context() or {}
    names = properties.get("x509_subject_alternative_name") or properties.get("x509_common_name") or ()
    return tuple(name.decode("utf-8", "replace") for name in names)


class NamedPeers:
    """Lets peers in whose certificate has one of these names."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def __call__(self, context: Context) -> None:
        """Raise PermissionDenied for any other peer."""
        names = peer_names(context)
        if self._names.isdisjoint(names):
            shown = ", ".join(names) or "no name"
            raise PermissionDenied(f"a certificate for {shown} may not call this service")
