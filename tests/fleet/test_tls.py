"""TLS on every hop: accepted and refused certificates, and errors about invalid files."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from async_tests import HANG_SECONDS, run_bounded
from certificates import Authority
from common.errors import InvalidInput, PermissionDenied, Unavailable
from common.rpc.client import open_channel
from common.rpc.probe import main as probe
from common.rpc.tls import mutual_of
from fleet.v1 import generation_pb2 as pb
from models.catalog import ServedModel
from services.cli.access import Access, access_of
from services.cli.client import connect as connect_client
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import start_worker
from tls_peers import mutual, outcome, tls_files, worker_settings


async def is_serving(address: str, credentials: grpc.ChannelCredentials | None) -> bool:
    async with open_channel(address, credentials, server_name="worker" if credentials else "") as channel:
        check: Any = channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        reply = await check(b"", timeout=10)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_worker_serves_only_the_coordinator(
    toy_model: ServedModel,
    store_url: str,
    fleet_ca: Authority,
    other_ca: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test() -> None:
        files = tls_files(fleet_ca, "worker")
        settings = worker_settings(store_url, health_listen="127.0.0.1:0", **files)
        worker = await start_worker("decoding", toy_model, settings)
        try:
            coordinator, other = fleet_ca.issue("coordinator"), fleet_ca.issue("decoding")
            assert await outcome(worker.address, mutual(fleet_ca, coordinator)) is None
            refused = await outcome(worker.address, mutual(fleet_ca, other))
            assert isinstance(refused, PermissionDenied)
            assert "decoding is not authorized" in refused.message
            assert await is_serving(worker.address, mutual(fleet_ca, other))
            assert isinstance(await outcome(worker.address, None, ""), Unavailable)
            assert isinstance(
                await outcome(worker.address, mutual(fleet_ca, other_ca.issue("coordinator"))),
                Unavailable,
            )
            assert isinstance(await outcome(worker.address, mutual(other_ca, coordinator)), Unavailable)
            assert isinstance(await outcome(worker.address, mutual(fleet_ca, coordinator), "coordinator"), Unavailable)
            anonymous = grpc.ssl_channel_credentials(fleet_ca.ca.read_bytes())
            assert isinstance(await outcome(worker.address, anonymous), Unavailable)

            assert await is_serving(worker.health_address, None)
            on_health_port = await outcome(worker.health_address, None, "")
            assert "not implemented" in str(on_health_port)
            monkeypatch.setenv("FLEET_HEALTH_LISTEN", worker.health_address)
            monkeypatch.setattr("common.rpc.probe._SECONDS", HANG_SECONDS)
            assert await asyncio.to_thread(probe, ["127.0.0.1:1"]) == 0
        finally:
            await worker.stop(5)

    run_bounded(test)


def test_request_succeeds_with_tls_on_every_hop(
    toy_model: ServedModel, store_url: str, fleet_ca: Authority, other_ca: Authority
) -> None:
    clients = other_ca.issue("client")
    arguments = {"tls": None, "tls_ca": str(fleet_ca.ca), "tls_cert": None, "tls_key": None, "api_key": None}
    without_certificate = access_of(argparse.Namespace(**arguments), {})
    environ = {"FLEET_TLS_CERT": str(clients.cert), "FLEET_TLS_KEY": str(clients.key)}
    with_certificate = access_of(argparse.Namespace(**arguments), environ)

    async def draw(endpoint: str, access: Access) -> list[bytes]:
        async with connect_client(endpoint, access) as client:
            request = pb.SubmitRequest(parameters=pb.GenerationParameters(prompt="x", seed=1))
            return [response.data async for response in client.generate(request) if response.data]

    async def test() -> None:
        async with AsyncExitStack() as stack:
            files = tls_files(fleet_ca, "worker")
            for spec in toy_model.services:
                worker = await start_worker(spec.service, toy_model, worker_settings(store_url, **files))
                stack.push_async_callback(worker.stop, 5)
            files = tls_files(fleet_ca, "coordinator", "127.0.0.1")
            settings = CoordinatorSettings(
                listen="127.0.0.1:0", redis=store_url, tls_client_ca=other_ca.ca, heartbeat_seconds=0.2, **files
            )
            coordinator = await start_coordinator([toy_model], settings)
            stack.push_async_callback(coordinator.stop, 5)
            assert b"".join(await draw(coordinator.address, with_certificate)).startswith(b"\x89PNG")
            with pytest.raises(Unavailable):
                await draw(coordinator.address, without_certificate)
            with pytest.raises(Unavailable):
                await draw(coordinator.address, Access())

    run_bounded(test)


def test_public_port_uses_its_own_certificate(
    toy_model: ServedModel, store_url: str, fleet_ca: Authority, other_ca: Authority
) -> None:
    async def test() -> None:
        public = other_ca.issue("127.0.0.1")
        settings = CoordinatorSettings(
            listen="127.0.0.1:0",
            redis=store_url,
            tls_public_cert=public.cert,
            tls_public_key=public.key,
            **tls_files(fleet_ca, "coordinator"),
        )
        coordinator = await start_coordinator([toy_model], settings)
        try:
            for authority, accepted in ((other_ca, True), (fleet_ca, False)):
                access = Access(grpc.ssl_channel_credentials(authority.ca.read_bytes()))
                async with connect_client(coordinator.address, access) as client:
                    if accepted:
                        assert await client.models()
                    else:
                        with pytest.raises(Unavailable, match="TLS handshake"):
                            await client.models()
        finally:
            await coordinator.stop(0)

    run_bounded(test)


def test_slow_tls_handshake_succeeds(toy_model: ServedModel, store_url: str, fleet_ca: Authority) -> None:
    """A host that loads weights on all cores delays handshakes."""

    async def start_proxy(address: str) -> asyncio.Server:
        host, _, port = address.rpartition(":")

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        async def delayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            worker_reader, worker_writer = await asyncio.open_connection(host, int(port))
            await asyncio.sleep(0.5)  # the delay of the handshake
            await asyncio.gather(pump(reader, worker_writer), pump(worker_reader, writer), return_exceptions=True)

        return await asyncio.start_server(delayed, "127.0.0.1", 0)

    async def test() -> None:
        worker = await start_worker("decoding", toy_model, worker_settings(store_url, **tls_files(fleet_ca, "worker")))
        try:
            async with await start_proxy(worker.address) as proxy:
                address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
                assert await outcome(address, mutual(fleet_ca, fleet_ca.issue("coordinator"))) is None
        finally:
            await worker.stop(5)

    run_bounded(test)


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


def test_error_of_invalid_tls_files_names_the_setting(fleet_ca: Authority, tmp_path: Path) -> None:
    for name, (files, message) in wrong_files(fleet_ca, tmp_path).items():
        with pytest.raises(InvalidInput, match=message) as caught:
            mutual_of(worker_settings("redis://x", **files))
        assert caught.value.field.startswith("tls_"), name
        assert "\n" not in caught.value.message


def test_worker_without_an_authority_does_not_start(toy_model: ServedModel, fleet_ca: Authority) -> None:
    issued = fleet_ca.issue("worker")
    settings = worker_settings("redis://127.0.0.1:1", tls_cert=issued.cert, tls_key=issued.key)
    with pytest.raises(InvalidInput, match="which verifies coordinators"):
        asyncio.run(start_worker("decoding", toy_model, settings))
