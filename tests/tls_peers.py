"""Workers and clients with mutual TLS: settings, credentials and the outcome of a call."""

from __future__ import annotations

from typing import Any

import grpc

from certificates import Authority, Certificate
from common.errors import FleetError
from common.rpc.client import get_model_info, open_channel
from common.rpc.tls import Mutual, read_authority, read_identity
from services.worker_settings import WorkerSettings


def tls_files(authority: Authority, *names: str) -> dict[str, Any]:
    """TLS settings of a process with a new certificate for these names."""
    issued = authority.issue(*names)
    return {"tls_ca": authority.ca, "tls_cert": issued.cert, "tls_key": issued.key}


def mutual(trusted: Authority, presented: Certificate) -> grpc.ChannelCredentials:
    """Credentials of a client: the authority that it trusts, and the certificate that it presents."""
    identity = read_identity(presented.cert, presented.key)
    assert identity is not None
    return Mutual(identity, read_authority(trusted.ca)).channel()


def worker_settings(store: str, **more: Any) -> WorkerSettings:
    """Settings of a worker of the toy model."""
    given: dict[str, Any] = {"model": "toy", "redis": store, "threads": 1, "device": "cpu"} | more
    return WorkerSettings(**given)


async def outcome(address: str, credentials: grpc.ChannelCredentials | None, name: str = "worker") -> FleetError | None:
    """Call GetModelInfo; returns its error, or None on success."""
    async with open_channel(address, credentials, server_name=name) as channel:
        try:
            await get_model_info(channel)
        except FleetError as error:
            return error
    return None
