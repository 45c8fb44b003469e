"""`fleet doctor`: the checks of the request store, on real servers."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from certificates import Authority
from common.state.connection import command
from common.state.store_server import StoreSettings
from doctor_lines import lines
from redis_servers import fill, run_on_empty_store, running_server, server_binaries, unfill
from sentinel_servers import replicated_servers
from services.cli import doctor, doctor_redis
from services.cli.__main__ import main
from services.cli.doctor_redis import redis_checks, skew_result
from services.cli.doctor_results import run_checks
from tls_store import tls_store

MIB = 1 << 20
DEFAULTS = {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "always"}
STRICT = StoreSettings()


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_server(request.param) as server:
        yield server.url


def found(url: str, store: StoreSettings = STRICT, **values: Any) -> list[str]:
    """The lines of all checks."""
    return lines(run_checks(redis_checks(url, lambda: store, lambda: values)))


def configure(url: str, **values: str) -> None:
    """Set configuration values; the others get the defaults of this file."""

    async def story(redis: Redis) -> None:
        await command(redis, "ACL", "SETUSER", "default", "on", "nopass", "~*", "&*", "+@all")
        for name, value in {**DEFAULTS, **{name.replace("_", "-"): value for name, value in values.items()}}.items():
            await command(redis, "CONFIG", "SET", name, value)

    run_on_empty_store(url, story)


def test_a_durable_primary_is_right(url: str) -> None:
    configure(url)
    server, policy, durability, scripts, memory, replicas, clock = found(url)
    assert server.startswith(f"ok redis: {url} answers in ")
    assert "ms: Valkey 9." in server or "ms: Redis 7." in server or "ms: Redis 8." in server
    assert policy == "ok redis policy: role master, no cluster, maxmemory-policy noeviction"
    assert durability == "ok redis durability: appendonly yes, appendfsync always"
    assert scripts == "ok redis scripts: the fleet's script is loaded, and scripts may write fleet:*"
    assert memory.startswith("ok redis memory: ")
    assert memory.endswith(" MiB are in use, without maxmemory")
    assert replicas == "ok redis replicas: 0 replicas are connected; store_replicas 0 waits for none"
    assert clock.startswith("ok clock: this host is 0.0")


def test_the_check_of_scripts_leaves_no_key(url: str) -> None:
    configure(url)

    async def story(redis: Redis) -> None:
        assert len(await asyncio.to_thread(found, url)) == 7
        assert not await command(redis, "KEYS", "*")

    run_on_empty_store(url, story)


def test_an_evicting_server_is_an_error_unless_allowed(url: str) -> None:
    configure(url, maxmemory_policy="allkeys-lru")
    line = found(url)[1]
    assert line.startswith("error redis policy: redis: maxmemory-policy allkeys-lru is not noeviction; ")
    line = found(url, StoreSettings(allow_eviction=True))[1]
    assert line.startswith("warning redis policy: maxmemory-policy allkeys-lru deletes accepted requests when memory ")
    configure(url)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"appendonly": "no"}, "appendonly no, appendfsync always: a restart of the server loses accepted requests"),
        ({"appendfsync": "everysec"}, "appendonly yes, appendfsync everysec: a crash of the server loses accepted"),
    ],
)
def test_a_server_that_is_not_durable_is_a_warning(url: str, values: Mapping[str, str], expected: str) -> None:
    configure(url, **values)
    line = found(url)[2]
    assert line.startswith(f"warning redis durability: {expected}")
    assert "-> set appendonly yes and appendfsync always" in line
    assert found(url, StoreSettings(allow_data_loss=True))[2].startswith("ok redis durability: ")
    configure(url)


def test_a_server_without_memory_for_requests(url: str) -> None:
    configure(url, maxmemory=str(8 * MIB))

    async def story(redis: Redis) -> None:
        await fill(redis, 6 * MIB)
        assert " of 8.0 MiB are in use" in (await asyncio.to_thread(found, url))[4]
        full = (await asyncio.to_thread(lambda: found(url, max_store_memory=0.5)))[4]
        assert full.startswith("error redis memory: ")
        assert " of 8.0 MiB are in use, so new requests are refused -> raise maxmemory" in full
        await unfill(redis)

    run_on_empty_store(url, story)
    configure(url)


def test_a_login_that_may_run_no_scripts_and_read_no_configuration(url: str) -> None:
    configure(url)

    async def story(redis: Redis) -> None:
        await command(redis, "ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all", "-eval", "-config", "-info")
        await command(redis, "ACL", "SETUSER", "me", "-role")

    run_on_empty_store(url, story)
    path = url.removeprefix("unix://")
    listed = found(f"unix://me:secret@{path}")
    assert "secret" not in "".join(listed)
    assert listed[0].startswith(f"warning redis: unix://***@{path} answers in ")
    assert "its version is not known -> let the login run INFO" in listed[0]
    assert listed[1].startswith("warning redis policy: role, cluster-enabled, maxmemory-policy cannot be read -> ")
    assert listed[2].startswith("warning redis durability: appendonly unknown, appendfsync unknown -> let the login")
    assert listed[3].startswith("error redis scripts: ")
    assert listed[3].endswith(" -> let the login run scripts on keys fleet:*")


def test_a_wrong_password_is_one_line(url: str) -> None:
    configure(url)
    (line,) = found(f"unix://me:wrongsecret@{url.removeprefix('unix://')}")
    assert "invalid username-password pair or user is disabled" in line
    assert "wrongsecret" not in line


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "redis://:secret@127.0.0.1:1/0",
            "error redis: the request store is unavailable: Error 111 connecting to 127.0.0.1:1",
        ),
        ("rediss://:secret@127.0.0.1:1/0", "error redis: the request store is unavailable: "),
        ("redis://:sec#ret@host", "error redis: redis: '***' is not a Redis URL"),
    ],
)
def test_a_store_that_cannot_be_reached_is_one_line(url: str, words: str) -> None:
    (line,) = found(url)
    assert line.startswith(words)
    assert "-> check host, port, login and TLS of --redis" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("version", "expected"),
    [("4.0.14", "error redis: "), ("6.2.7", "warning redis: "), ("7.0.15", "ok redis: "), ("8.2.1", "ok redis: ")],
)
def test_old_servers_are_named(url: str, version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def info(*_: object) -> Mapping[str, Any]:
        return {"redis_version": version}

    configure(url)
    monkeypatch.setattr(doctor_redis, "_info", info)
    line = found(url)[0]
    assert line.startswith(expected)
    assert f"Redis {version}" in line


def test_replicas_that_store_replicas_demands() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="fleet-replicas-") as directory,
        replicated_servers(Path(directory)) as servers,
    ):
        assert found(servers.url, store_replicas=1)[5].startswith("ok redis replicas: 1 of 1 acknowledged a write in ")
        line = found(servers.url, store_replicas=2)[5]
        assert line.startswith("error redis replicas: store_replicas: 1 replicas of the request store acknowledged ")
        assert "(1 are connected) -> until then no request is accepted" in line
        assert found(servers.replica_url)[1].startswith("error redis policy: redis: this server is a replica")


@pytest.mark.parametrize(
    ("skew", "tolerance", "expected"),
    [
        (0.4, 0.001, "ok clock: this host is 0.400 s ahead of the Redis server (exact to 0.001 s)"),
        (-1.5, 1.0, "ok clock: this host is 1.500 s behind the Redis server (exact to 1.000 s)"),
        (-5.0, 0.1, "warning clock: this host is 5.000 s behind the Redis server -> synchronise the clocks of both"),
        (31.0, 0.1, "error clock: this host is 31.000 s ahead of the Redis server, so tokens and certificates are "),
    ],
)
def test_clocks_that_differ(skew: float, tolerance: float, expected: str) -> None:
    assert lines([skew_result(skew, tolerance, 30.0)])[0].startswith(expected)


def test_a_clock_that_is_ahead_is_measured(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(url)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10)
    (line,) = [line for line in found(url) if " clock: " in line]
    assert line.startswith(("warning clock: this host is 10.0", "warning clock: this host is 9.9"))
    (line,) = [line for line in found(url, jwt_leeway_seconds=5.0) if " clock: " in line]
    assert line.startswith("error clock: ")


@pytest.mark.parametrize("name", sorted(server_binaries()))
def test_a_store_over_tls(name: str, tmp_path: Path) -> None:
    fleet, others = Authority(tmp_path / "fleet"), Authority(tmp_path / "others", "others")
    client = fleet.issue("coordinator")

    async def story() -> None:
        async with asyncio.timeout(60), tls_store(name, fleet) as place:
            url = f"rediss://{place}/0?ssl_certfile={client.cert}&ssl_keyfile={client.key}&ssl_ca_certs="
            listed = await asyncio.to_thread(found, f"{url}{fleet.ca}")
            assert [line.split()[0] for line in listed] == ["ok"] * 7
            (line,) = await asyncio.to_thread(found, f"{url}{others.ca}")
            assert line.startswith("error redis: ")
            assert "certificate verify failed" in line

    asyncio.run(story())


def test_the_command_reports_the_store(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(url, appendonly="no")
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    monkeypatch.setenv("FLEET_ALLOW_DATA_LOSS", "true")
    monkeypatch.setenv("FLEET_STORE_REPLICAS", "1")
    monkeypatch.setattr("common.state.replication._ACKNOWLEDGE_SECONDS", 0.1)
    assert main(["doctor", "--json", "--redis", url]) == 2
    captured = capsys.readouterr()
    results = {each["check"]: each["status"] for each in json.loads(captured.out)["results"]}
    assert results["redis durability"] == "ok"
    assert results["redis replicas"] == "error"
    assert not captured.err, "what is logged of the store is in the report"
    configure(url)
