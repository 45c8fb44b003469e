"""Certificates that are wrong for what they are shown for, and new ones that take the place of old ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from certificates import Authority, Certificate
from common.errors import Unavailable
from fleet.v1 import generation_pb2 as pb
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from redis_servers import running_server
from services.cli.access import Access
from services.cli.client import FleetClient, RequestFailed, raise_unless_succeeded
from services.cli.client import connect as connect_client
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import Worker, start_worker
from tls_peers import mutual, outcome, tls_files, worker_settings
from toy_checkpoint import build_toy_checkpoint, toy_family

EXPIRED = timedelta(hours=-1)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with running_server("valkey") as server:
        yield server.url


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as directory:
        path = build_toy_checkpoint(tmp_path_factory.mktemp("toy"))
        yield open_model(f"toy={path}", load_registry([directory]))


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "somebody else")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(main())


@asynccontextmanager
async def worker_that_shows(
    toy: ServedModel, store: str, authority: Authority, shown: Certificate
) -> AsyncIterator[Worker]:
    """A worker of the decoding service, which looks at its files before each handshake."""
    files = {"tls_ca": authority.ca, "tls_cert": shown.cert, "tls_key": shown.key}
    worker = await start_worker("decoding", toy, worker_settings(store, reload_seconds=0, **files))
    try:
        yield worker
    finally:
        await worker.stop(5)


async def draw(client: FleetClient) -> bytes:
    """A picture. Raises RequestFailed."""
    request = pb.SubmitRequest(parameters=pb.GenerationParameters(prompt="x", seed=1))
    data = b""
    async for response in client.generate(request):
        raise_unless_succeeded("", response.event.state_change)
        data += response.data
    return data


def test_a_worker_refuses_certificates_that_are_not_the_coordinators_now(
    toy: ServedModel, store: str, fleet: Authority, others: Authority
) -> None:
    async def test() -> None:
        async with worker_that_shows(toy, store, fleet, fleet.issue("worker")) as worker:
            for shown in (
                fleet.issue("coordinator", valid=EXPIRED),
                fleet.issue("coordinator", usage=ExtendedKeyUsageOID.SERVER_AUTH),
                others.issue("coordinator"),
            ):
                assert isinstance(await outcome(worker.address, mutual(fleet, shown)), Unavailable)
            right = fleet.issue("coordinator", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
            assert await outcome(worker.address, mutual(fleet, right)) is None

    run(test)


def test_a_coordinator_refuses_workers_whose_certificate_is_none_of_a_worker_now(
    toy: ServedModel, store: str, fleet: Authority, others: Authority
) -> None:
    async def test() -> None:
        credentials = mutual(fleet, fleet.issue("coordinator"))
        for shown in (
            fleet.issue("worker", valid=EXPIRED),
            fleet.issue("worker", usage=ExtendedKeyUsageOID.CLIENT_AUTH),
            fleet.issue("coordinator"),
            others.issue("worker"),
        ):
            async with worker_that_shows(toy, store, fleet, shown) as worker:
                assert isinstance(await outcome(worker.address, credentials), Unavailable)
        async with worker_that_shows(toy, store, fleet, fleet.issue("worker")) as worker:
            assert await outcome(worker.address, credentials) is None

    run(test)


def test_a_worker_takes_new_files_and_keeps_the_old_ones_while_they_do_not_fit(
    toy: ServedModel, store: str, fleet: Authority, others: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        shown = fleet.issue("worker")
        async with worker_that_shows(toy, store, fleet, shown) as worker:
            credentials = mutual(fleet, fleet.issue("coordinator"))
            assert await outcome(worker.address, credentials) is None

            old_key = shown.key.read_bytes()
            new = fleet.issue("another")
            shown.cert.write_bytes(new.cert.read_bytes())
            with caplog.at_level(logging.ERROR):
                assert await outcome(worker.address, credentials) is None
            assert "the key is of another certificate" in caplog.text
            assert old_key.decode() not in caplog.text

            shown.key.write_bytes(new.key.read_bytes())
            assert isinstance(await outcome(worker.address, credentials), Unavailable)
            assert await outcome(worker.address, credentials, "another") is None

            fleet.ca.write_bytes(others.ca.read_bytes())
            theirs = mutual(fleet, others.issue("coordinator"))
            assert isinstance(await outcome(worker.address, credentials, "another"), Unavailable)
            shown_now = others.issue("worker")
            shown.cert.write_bytes(shown_now.cert.read_bytes())
            shown.key.write_bytes(shown_now.key.read_bytes())
            assert await outcome(worker.address, theirs) is None

    run(test)


def test_a_coordinator_shows_clients_and_workers_its_new_certificate(
    toy: ServedModel, store: str, fleet: Authority
) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            for spec in toy.services:
                worker = await start_worker(spec.service, toy, worker_settings(store, **tls_files(fleet, "worker")))
                stack.push_async_callback(worker.stop, 5)
            files = tls_files(fleet, "coordinator", "127.0.0.1")
            settings = CoordinatorSettings(
                listen="127.0.0.1:0", redis=store, heartbeat_seconds=0.2, reload_seconds=0, **files
            )
            coordinator = await start_coordinator([toy], settings)
            stack.push_async_callback(coordinator.stop, 5)
            access = Access(grpc.ssl_channel_credentials(fleet.ca.read_bytes()))
            client = await stack.enter_async_context(connect_client(coordinator.address, access))
            assert await draw(client)

            kept = {name: files[name].read_bytes() for name in ("tls_cert", "tls_key")}
            stranger = fleet.issue("stranger")
            files["tls_cert"].write_bytes(stranger.cert.read_bytes())
            files["tls_key"].write_bytes(stranger.key.read_bytes())
            with pytest.raises(RequestFailed, match="a certificate for stranger may not call"):
                await draw(client)
            async with connect_client(coordinator.address, access) as newcomer:
                with pytest.raises(Unavailable):
                    await newcomer.models()

            for name, content in kept.items():
                files[name].write_bytes(content)
            assert await draw(client)
            async with connect_client(coordinator.address, access) as newcomer:
                assert await newcomer.models()

    run(test)
