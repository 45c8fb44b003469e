"""gRPC targets and store URLs with any characters in their paths, and connections without a proxy."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from redis import Redis

from common.rpc import probe
from common.rpc.address import is_local, proxy_variable, target_of
from common.rpc.client import open_channel
from common.rpc.fleet_server import FleetServer
from common.state.embedded import EmbeddedStore
from services.cli.__main__ import main

ROOT = Path(__file__).parents[2]
DEAD_PROXY = "http://127.0.0.1:9"
ODD_NAMES = ("a b", "50%", "%41", "a#b", "a?b=c", "a'b", 'a"b', "a@b:c", "prüfung", "文")


async def is_serving(channel: grpc.aio.Channel) -> bool:
    check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    reply = await check(health_pb2.HealthCheckRequest(), timeout=10)
    return reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("name", ODD_NAMES)
def test_servers_listen_on_sockets_in_directories_of_any_name(name: str) -> None:
    async def test(directory: Path) -> None:
        server = FleetServer(f"unix:{directory}/s.sock")
        address = await server.start()
        await server.set_ready(True)
        assert (directory / "s.sock").is_socket()
        async with open_channel(address) as channel:
            assert await is_serving(channel)
        assert await asyncio.to_thread(probe.main, [address]) == 0
        await server.drain(0)

    with tempfile.TemporaryDirectory(dir="/tmp") as short_directory:
        (Path(short_directory) / name).mkdir()
        asyncio.run(test(Path(short_directory) / name))


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_embedded_store_runs_in_directories_of_any_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        parent = Path(directory) / name
        parent.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        with EmbeddedStore(appendfsync="no") as store, Redis.from_url(store.url) as client:
            assert client.ping()
            assert list(parent.iterdir())


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_connections_on_this_host_use_no_proxy(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, DEAD_PROXY)

    async def test() -> None:
        server = FleetServer("127.0.0.1:0")
        address = await server.start()
        await server.set_ready(True)
        for channel in (open_channel(address), open_channel(address, may_use_proxy=True)):
            async with channel:
                assert await is_serving(channel)
        assert await asyncio.to_thread(probe.main, [address]) == 0
        async with grpc.aio.insecure_channel(address) as proxied:
            with pytest.raises(grpc.aio.AioRpcError):
                await is_serving(proxied)
        await server.drain(0)

    asyncio.run(test())


def test_channels_are_opened_by_known_modules_only() -> None:
    opening = {
        str(path.relative_to(ROOT))
        for package in ("common", "models", "services")
        for path in (ROOT / package).rglob("*.py")
        if "insecure_channel(" in (text := path.read_text()) or "secure_channel(" in text
    }
    assert opening == {"common/rpc/client.py", "common/rpc/probe.py"}


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/tmp/s", True),
        ("localhost:1", True),
        ("127.4.5.6:1", True),
        ("[::1]:1", True),
        ("10.0.0.1:1", False),
        ("fleet.example:50051", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_is_local_recognizes_addresses_of_this_host(address: str, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({}, ""),
        ({"http_proxy": DEAD_PROXY}, "http_proxy"),
        ({"http_proxy": DEAD_PROXY, "https_proxy": DEAD_PROXY}, "https_proxy"),
        ({"http_proxy": DEAD_PROXY, "grpc_proxy": DEAD_PROXY}, "grpc_proxy"),
        ({"http_proxy": DEAD_PROXY, "no_proxy": "other.example"}, "http_proxy"),
        ({"http_proxy": DEAD_PROXY, "no_proxy": "other.example, .example"}, ""),
        ({"http_proxy": DEAD_PROXY, "no_grpc_proxy": "fleet.example"}, ""),
        ({"HTTP_PROXY": DEAD_PROXY}, ""),
    ],
)
def test_proxy_variable_follows_precedence_and_no_proxy(environ: dict[str, str], variable: str) -> None:
    assert proxy_variable("fleet.example:50051", environ) == variable
    assert proxy_variable("127.0.0.1:50051", environ) == ""


def test_target_of_leaves_host_addresses_unchanged() -> None:
    assert target_of("fleet.example:50051") == "fleet.example:50051"
    assert target_of("unix:///run/fleet/a.sock") == target_of("unix:/run/fleet/a.sock") == "unix:/run/fleet/a.sock"


def test_the_connection_error_names_the_proxy_variable_and_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("grpc_proxy", "https_proxy", "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    assert main(["models", "--endpoint", "fleet.example:50051"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fleet models: no fleet answers at fleet.example:50051 through the proxy of http_proxy")
    assert error.count("\n") == 1
    assert "secret" not in error
