"""TLS of the coordinator: server credentials of its ports, and channels to workers."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from common.errors import InvalidInput
from common.rpc.client import open_channel
from common.rpc.tls import (
    Mutual,
    ServerIdentity,
    mutual_credentials,
    read_authority,
    read_identity,
    server_credentials,
    watch,
    watch_mutual,
)
from common.watched import WatchedFiles
from services.coordinator.settings import CoordinatorSettings


def public_credentials(settings: CoordinatorSettings) -> grpc.ServerCredentials | None:
    """Server credentials of the public port; None for plain text. Raises InvalidInput for unusable files."""
    if _identity_for_clients(settings) is None:
        return None

    def read() -> ServerIdentity:
        shown = _identity_for_clients(settings)
        if shown is None:
            raise AssertionError("settings do not change")
        return shown

    own = (settings.tls_public_cert, settings.tls_public_key)
    files = own if own != (None, None) else (settings.tls_cert, settings.tls_key)
    watched = watch(settings, (*files, settings.tls_client_ca), read, "certificate for clients")
    return server_credentials(watched.versioned)


def scaler_credentials(settings: CoordinatorSettings) -> grpc.ServerCredentials | None:
    """Server credentials for mutual TLS of the scaler port; None for plain text.

    Raises InvalidInput for unusable files.
    """
    tls = watch_mutual(settings)
    return None if tls is None else mutual_credentials(tls)


def _identity_for_clients(settings: CoordinatorSettings) -> ServerIdentity | None:
    identity = read_identity(settings.tls_public_cert, settings.tls_public_key, name="tls_public")
    identity = identity or read_identity(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is None:
        return None if identity is None else ServerIdentity(identity)
    clients = read_authority(settings.tls_client_ca, name="tls_client_ca")
    if identity is None:
        raise InvalidInput("tls_client_ca is set without tls_cert and tls_key; set both", field="tls_cert")
    return ServerIdentity(identity, clients)


@dataclass(frozen=True)
class WorkerAccess:
    """Opens channels to workers, with mutual TLS where it is configured."""

    tls: WatchedFiles[Mutual] | None = None
    worker_name: str = ""

    @classmethod
    def of(cls, settings: CoordinatorSettings) -> WorkerAccess:
        """Read the TLS files of the settings. Raises InvalidInput for unusable files."""
        return cls(watch_mutual(settings), settings.tls_worker_name)

    @property
    def version(self) -> int:
        """Version of the TLS files, which increases at each change. Open channels still use the earlier certificate."""
        return 0 if self.tls is None else self.tls.versioned()[0]

    def open(self, address: str) -> grpc.aio.Channel:
        """Open a channel to a worker, with the current certificate."""
        if self.tls is None:
            return open_channel(address)
        return open_channel(address, self.tls.value.channel(), server_name=self.worker_name)
