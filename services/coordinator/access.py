"""How the coordinator meets others over TLS: clients at its public port, and workers when it calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import grpc

from common.errors import InvalidInput
from common.rpc.client import open_channel
from common.rpc.tls import mutual_of, read_authority, read_identity, server_credentials
from services.coordinator.settings import CoordinatorSettings


def public_credentials(settings: CoordinatorSettings) -> grpc.ServerCredentials | None:
    """What the public port shows and asks for; None for plain text. Raises InvalidInput for files that do not fit."""
    identity = read_identity(settings.tls_public_cert, settings.tls_public_key, name="tls_public")
    identity = identity or read_identity(settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca is None:
        return None if identity is None else server_credentials(identity)
    clients = read_authority(settings.tls_client_ca, name="tls_client_ca")
    if identity is None:
        raise InvalidInput("tls_client_ca is set without tls_cert and tls_key", field="tls_cert")
    return server_credentials(identity, clients=clients)


def worker_channels(settings: CoordinatorSettings) -> Callable[[str], grpc.aio.Channel]:
    """What opens channels to workers: over mutual TLS where `tls_ca` is set. Raises InvalidInput as above."""
    tls = mutual_of(settings)
    if tls is None:
        return open_channel
    return partial(open_channel, credentials=tls.channel(), server_name=settings.tls_worker_name)
