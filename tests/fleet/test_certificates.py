"""Invalid TLS certificates are refused, and renewed certificates are reloaded."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from async_tests import run_bounded
from certificates import Authority, Certificate
from common.errors import Unavailable
from fleet.v1 import generation_pb2 as pb
from models.catalog import ServedModel
from services.cli.access import Access
from services.cli.client import FleetClient, RequestFailed, raise_unless_succeeded
from services.cli.client import connect as connect_client
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import Worker, start_worker
from tls_peers import mutual, outcome, tls_files, worker_settings

EXPIRED = timedelta(hours=-1)


@asynccontextmanager
async def worker_with(
    toy: ServedModel, store: str, authority: Authority, presented: Certificate
) -> AsyncIterator[Worker]:
    """A worker of the decoding service that rereads its TLS files before each handshake."""
    files = {"tls_ca": authority.ca, "tls_cert": presented.cert, "tls_key": presented.key}
    worker = await start_worker("decoding", toy, worker_settings(store, reload_seconds=0, **files))
    try:
        yield worker
    finally:
        await worker.stop(5)


async def generate(client: FleetClient) -> bytes:
    """Generate an image. Raises RequestFailed."""
    request = pb.SubmitRequest(parameters=pb.GenerationParameters(prompt="x", seed=1))
    data = b""
    async for response in client.generate(request):
        raise_unless_succeeded("", response.event.state_change)
        data += response.data
    return data


def test_worker_refuses_invalid_coordinator_certificates(
    toy_model: ServedModel, store_url: str, fleet_ca: Authority, other_ca: Authority
) -> None:
    async def test() -> None:
        async with worker_with(toy_model, store_url, fleet_ca, fleet_ca.issue("worker")) as worker:
            for presented in (
                fleet_ca.issue("coordinator", valid=EXPIRED),
                fleet_ca.issue("coordinator", usage=ExtendedKeyUsageOID.SERVER_AUTH),
                other_ca.issue("coordinator"),
            ):
                assert isinstance(await outcome(worker.address, mutual(fleet_ca, presented)), Unavailable)
            valid = fleet_ca.issue("coordinator", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
            assert await outcome(worker.address, mutual(fleet_ca, valid)) is None

    run_bounded(test)


def test_coordinator_refuses_invalid_worker_certificates(
    toy_model: ServedModel, store_url: str, fleet_ca: Authority, other_ca: Authority
) -> None:
    async def test() -> None:
        credentials = mutual(fleet_ca, fleet_ca.issue("coordinator"))
        for presented in (
            fleet_ca.issue("worker", valid=EXPIRED),
            fleet_ca.issue("worker", usage=ExtendedKeyUsageOID.CLIENT_AUTH),
            fleet_ca.issue("coordinator"),
            other_ca.issue("worker"),
        ):
            async with worker_with(toy_model, store_url, fleet_ca, presented) as worker:
                assert isinstance(await outcome(worker.address, credentials), Unavailable)
        async with worker_with(toy_model, store_url, fleet_ca, fleet_ca.issue("worker")) as worker:
            assert await outcome(worker.address, credentials) is None

    run_bounded(test)


def test_worker_reloads_certificates_and_ignores_mismatched_files(
    toy_model: ServedModel,
    store_url: str,
    fleet_ca: Authority,
    other_ca: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        presented = fleet_ca.issue("worker")
        async with worker_with(toy_model, store_url, fleet_ca, presented) as worker:
            credentials = mutual(fleet_ca, fleet_ca.issue("coordinator"))
            assert await outcome(worker.address, credentials) is None

            old_key = presented.key.read_bytes()
            new = fleet_ca.issue("another")
            presented.cert.write_bytes(new.cert.read_bytes())
            with caplog.at_level(logging.ERROR):
                assert await outcome(worker.address, credentials) is None
            assert "the key is of another certificate" in caplog.text
            assert old_key.decode() not in caplog.text

            presented.key.write_bytes(new.key.read_bytes())
            assert isinstance(await outcome(worker.address, credentials), Unavailable)
            assert await outcome(worker.address, credentials, "another") is None

            fleet_ca.ca.write_bytes(other_ca.ca.read_bytes())
            new_credentials = mutual(fleet_ca, other_ca.issue("coordinator"))
            assert isinstance(await outcome(worker.address, credentials, "another"), Unavailable)
            renewed = other_ca.issue("worker")
            presented.cert.write_bytes(renewed.cert.read_bytes())
            presented.key.write_bytes(renewed.key.read_bytes())
            assert await outcome(worker.address, new_credentials) is None

    run_bounded(test)


def test_coordinator_presents_its_reloaded_certificate(
    toy_model: ServedModel, store_url: str, fleet_ca: Authority
) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            for spec in toy_model.services:
                worker = await start_worker(
                    spec.service, toy_model, worker_settings(store_url, **tls_files(fleet_ca, "worker"))
                )
                stack.push_async_callback(worker.stop, 5)
            files = tls_files(fleet_ca, "coordinator", "127.0.0.1")
            settings = CoordinatorSettings(
                listen="127.0.0.1:0", redis=store_url, heartbeat_seconds=0.2, reload_seconds=0, **files
            )
            coordinator = await start_coordinator([toy_model], settings)
            stack.push_async_callback(coordinator.stop, 5)
            access = Access(grpc.ssl_channel_credentials(fleet_ca.ca.read_bytes()))
            client = await stack.enter_async_context(connect_client(coordinator.address, access))
            assert await generate(client)

            original = {name: files[name].read_bytes() for name in ("tls_cert", "tls_key")}
            stranger = fleet_ca.issue("stranger")
            files["tls_cert"].write_bytes(stranger.cert.read_bytes())
            files["tls_key"].write_bytes(stranger.key.read_bytes())
            with pytest.raises(RequestFailed, match="a certificate for stranger is not authorized to call"):
                await generate(client)
            async with connect_client(coordinator.address, access) as newcomer:
                with pytest.raises(Unavailable):
                    await newcomer.models()

            for name, content in original.items():
                files[name].write_bytes(content)
            assert await generate(client)
            async with connect_client(coordinator.address, access) as newcomer:
                assert await newcomer.models()

    run_bounded(test)
