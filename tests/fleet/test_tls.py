"""TLS on every hop: who gets in, who does not, and what wrong files are called."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from certificates import Authority
from common.errors import InvalidInput, PermissionDenied, Unavailable
from common.rpc.client import open_channel
from common.rpc.probe import main as probe
from common.rpc.tls import mutual_of
from fleet.v1 import generation_pb2 as pb
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from redis_servers import running_server
from services.cli.access import Access, access_of
from services.cli.client import connect as connect_client
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import start_worker
from tls_peers import mutual, outcome, tls_files, worker_settings
from toy_checkpoint import build_toy_checkpoint, toy_family


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with running_server("valkey") as server:
        yield server.url


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as directory:
        path = build_toy_checkpoint(tmp_path_factory.mktemp("toy"))
        yield open_model(f"toy={path}", load_registry([directory]))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "somebody else")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(main())


async def is_serving(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with open_channel(address, credentials, server_name="worker" if credentials else "") as channel:
        check: Any = channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        reply = await check(b"", timeout=10)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_a_worker_serves_the_coordinator_and_nobody_else(
    toy: ServedModel, store: str, fleet: Authority, others: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        files = tls_files(fleet, "worker")
        settings = worker_settings(store, health_listen="127.0.0.1:0", **files)
        worker = await start_worker("decoding", toy, settings)
        try:
            coordinator, other = fleet.issue("coordinator"), fleet.issue("decoding")
            assert await outcome(worker.address, mutual(fleet, coordinator)) is None
            refused = await outcome(worker.address, mutual(fleet, other))
            assert isinstance(refused, PermissionDenied)
            assert "decoding may not" in refused.message
            assert await is_serving(worker.address, mutual(fleet, other))
            assert isinstance(await outcome(worker.address, None, ""), Unavailable)
            assert isinstance(await outcome(worker.address, mutual(fleet, others.issue("coordinator"))), Unavailable)
            assert isinstance(await outcome(worker.address, mutual(others, coordinator)), Unavailable)
            assert isinstance(await outcome(worker.address, mutual(fleet, coordinator), "coordinator"), Unavailable)
            nobody = grpc.ssl_channel_credentials(fleet.ca.read_bytes())
            assert isinstance(await outcome(worker.address, nobody), Unavailable)

            assert await is_serving(worker.health_address, None)
            unknown = await outcome(worker.health_address, None, "")
            assert "not implemented" in str(unknown)
            monkeypatch.setenv("FLEET_HEALTH_LISTEN", worker.health_address)
            assert await asyncio.to_thread(probe, ["127.0.0.1:1"]) == 0
        finally:
            await worker.stop(5)

    run(test)


def test_a_request_goes_through_a_fleet_whose_every_hop_is_tls(
    toy: ServedModel, store: str, fleet: Authority, others: Authority
) -> None:
    clients = others.issue("client")
    arguments = {"tls": None, "tls_ca": str(fleet.ca), "tls_cert": None, "tls_key": None, "api_key": None}
    unknown = access_of(argparse.Namespace(**arguments), {})
    environ = {"FLEET_TLS_CERT": str(clients.cert), "FLEET_TLS_KEY": str(clients.key)}
    known = access_of(argparse.Namespace(**arguments), environ)

    async def draw(endpoint: str, access: Access) -> list[bytes]:
        async with connect_client(endpoint, access) as client:
            request = pb.SubmitRequest(parameters=pb.GenerationParameters(prompt="x", seed=1))
            return [response.data async for response in client.generate(request) if response.data]

    async def test() -> None:
        async with AsyncExitStack() as stack:
            files = tls_files(fleet, "worker")
            for spec in toy.services:
                worker = await start_worker(spec.service, toy, worker_settings(store, **files))
                stack.push_async_callback(worker.stop, 5)
            files = tls_files(fleet, "coordinator", "127.0.0.1")
            settings = CoordinatorSettings(
                listen="127.0.0.1:0", redis=store, tls_client_ca=others.ca, heartbeat_seconds=0.2, **files
            )
            coordinator = await start_coordinator([toy], settings)
            stack.push_async_callback(coordinator.stop, 5)
            assert b"".join(await draw(coordinator.address, known)).startswith(b"\x89PNG")
            with pytest.raises(Unavailable):
                await draw(coordinator.address, unknown)
            with pytest.raises(Unavailable):
                await draw(coordinator.address, Access())

    run(test)


def test_the_public_port_may_show_another_certificate(
    toy: ServedModel, store: str, fleet: Authority, others: Authority
) -> None:
    async def test() -> None:
        shown = others.issue("127.0.0.1")
        settings = CoordinatorSettings(
            listen="127.0.0.1:0",
            redis=store,
            tls_public_cert=shown.cert,
            tls_public_key=shown.key,
            **tls_files(fleet, "coordinator"),
        )
        coordinator = await start_coordinator([toy], settings)
        try:
            for authority, accepted in ((others, True), (fleet, False)):
                access = Access(grpc.ssl_channel_credentials(authority.ca.read_bytes()))
                async with connect_client(coordinator.address, access) as client:
                    if accepted:
                        assert await client.models()
                    else:
                        with pytest.raises(Unavailable, match="could not agree on TLS"):
                            await client.models()
        finally:
            await coordinator.stop(0)

    run(test)


def test_a_handshake_may_take_its_time(toy: ServedModel, store: str, fleet: Authority) -> None:
    """As on a machine whose cores are all loading weights."""

    async def serve(address: str) -> asyncio.Server:
        host, _, port = address.rpartition(":")

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            behind_reader, behind_writer = await asyncio.open_connection(host, int(port))
            await asyncio.sleep(0.5)  # what is tested
            await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer), return_exceptions=True)

        return await asyncio.start_server(delayed, "127.0.0.1", 0)

    async def test() -> None:
        worker = await start_worker("decoding", toy, worker_settings(store, **tls_files(fleet, "worker")))
        try:
            async with await serve(worker.address) as slow:
                address = f"127.0.0.1:{slow.sockets[0].getsockname()[1]}"
                assert await outcome(address, mutual(fleet, fleet.issue("coordinator"))) is None
        finally:
            await worker.stop(5)

    run(test)


def wrong_files(fleet: Authority, directory: Path) -> dict[str, tuple[dict[str, Any], str]]:
    right, other = tls_files(fleet, "worker"), tls_files(fleet, "coordinator")
    text = directory / "text.pem"
    text.write_text("not a certificate")
    return {
        "no key": ({"tls_cert": right["tls_cert"]}, "tls_cert is set without tls_key"),
        "no certificate": ({"tls_key": right["tls_key"]}, "tls_key is set without tls_cert"),
        "authority alone": ({"tls_ca": right["tls_ca"]}, "tls_ca is set without"),
        "missing": (right | {"tls_cert": directory / "none.pem"}, "none.pem cannot be read: No such file"),
        "missing authority": (right | {"tls_ca": directory / "none.pem"}, "none.pem cannot be read: No such file"),
        "directory": (right | {"tls_key": directory}, "cannot be read: Is a directory"),
        "not PEM": (right | {"tls_cert": text}, "not a certificate and its key in PEM"),
        "no authority": (right | {"tls_ca": text}, "contains no certificate in PEM"),
        "mismatch": (right | {"tls_key": other["tls_key"]}, "the key is of another certificate"),
    }


def test_files_that_do_not_fit_are_named(fleet: Authority, tmp_path: Path) -> None:
    for name, (files, words) in wrong_files(fleet, tmp_path).items():
        with pytest.raises(InvalidInput, match=words) as caught:
            mutual_of(worker_settings("redis://x", **files))
        assert caught.value.field.startswith("tls_"), name
        assert "\n" not in caught.value.message


def test_a_worker_without_an_authority_does_not_start(toy: ServedModel, fleet: Authority) -> None:
    issued = fleet.issue("worker")
    settings = worker_settings("redis://127.0.0.1:1", tls_cert=issued.cert, tls_key=issued.key)
    with pytest.raises(InvalidInput, match="by which a worker knows coordinators"):
        asyncio.run(start_worker("decoding", toy, settings))
