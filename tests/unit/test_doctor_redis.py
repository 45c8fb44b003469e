"""`fleet doctor`: checks of the request store, on real servers."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from async_tests import HANG_SECONDS
from certificates import Authority
from common.state.connection import command
from common.state.store_server import StoreSettings
from doctor_lines import lines
from redis_servers import fill, run_on_empty_store, server_binaries, unfill
from sentinel_servers import replicated_servers
from services.cli import doctor, doctor_redis
from services.cli.__main__ import main
from services.cli.doctor_redis import redis_checks, skew_result
from services.cli.doctor_results import run_checks
from tls_store import tls_store

MIB = 1 << 20
DEFAULTS = {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "always"}
STRICT = StoreSettings()


def report_lines(url: str, store: StoreSettings = STRICT, **values: Any) -> list[str]:
    """Output lines of all checks of the store."""
    return lines(run_checks(redis_checks(url, lambda: store, lambda: values)))


def configure(url: str, **values: str) -> None:
    """Empty the store, permit all commands to the default user, and set DEFAULTS overridden by `values`."""

    async def scenario(redis: Redis) -> None:
        await command(redis, "ACL", "SETUSER", "default", "on", "nopass", "~*", "&*", "+@all")
        for name, value in {**DEFAULTS, **{name.replace("_", "-"): value for name, value in values.items()}}.items():
            await command(redis, "CONFIG", "SET", name, value)

    run_on_empty_store(url, scenario)


def test_a_durable_primary_is_accepted(each_store_url: str) -> None:
    configure(each_store_url)
    server, policy, durability, scripts, memory, replicas, clock = report_lines(each_store_url)
    assert server.startswith(f"ok redis: {each_store_url} answers in ")
    assert "ms: Valkey 9." in server or "ms: Redis 7." in server or "ms: Redis 8." in server
    assert policy == "ok redis policy: role master, no cluster, maxmemory-policy noeviction"
    assert durability == "ok redis durability: appendonly yes, appendfsync always"
    assert scripts == "ok redis scripts: the fleet's script is loaded, and scripts may write fleet:*"
    assert memory.startswith("ok redis memory: ")
    assert memory.endswith(" MiB are in use, without maxmemory")
    assert replicas == "ok redis replicas: 0 replicas are connected; store_replicas 0 waits for none"
    skew, tolerance = map(float, re.findall(r"\d+\.\d+", clock))
    assert clock.startswith("ok clock: this host is ")
    assert skew <= tolerance + 0.01, "both clocks are the same"


def test_the_check_of_scripts_leaves_no_key(each_store_url: str) -> None:
    configure(each_store_url)

    async def scenario(redis: Redis) -> None:
        assert len(await asyncio.to_thread(report_lines, each_store_url)) == 7
        assert not await command(redis, "KEYS", "*")

    run_on_empty_store(each_store_url, scenario)


def test_an_evicting_server_is_an_error_unless_allowed(each_store_url: str) -> None:
    configure(each_store_url, maxmemory_policy="allkeys-lru")
    line = report_lines(each_store_url)[1]
    assert line.startswith("error redis policy: redis: maxmemory-policy allkeys-lru is not noeviction; ")
    line = report_lines(each_store_url, StoreSettings(allow_eviction=True))[1]
    assert line.startswith("warning redis policy: maxmemory-policy allkeys-lru deletes accepted requests when memory ")
    configure(each_store_url)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"appendonly": "no"}, "appendonly no, appendfsync always: a restart of the server loses accepted requests"),
        ({"appendfsync": "everysec"}, "appendonly yes, appendfsync everysec: a crash of the server loses accepted"),
    ],
)
def test_a_server_that_is_not_durable_is_a_warning(
    each_store_url: str, values: Mapping[str, str], expected: str
) -> None:
    configure(each_store_url, **values)
    line = report_lines(each_store_url)[2]
    assert line.startswith(f"warning redis durability: {expected}")
    assert "-> set appendonly yes and appendfsync always" in line
    assert report_lines(each_store_url, StoreSettings(allow_data_loss=True))[2].startswith("ok redis durability: ")
    configure(each_store_url)


def test_a_full_server_is_an_error(each_store_url: str) -> None:
    configure(each_store_url, maxmemory=str(8 * MIB))

    async def scenario(redis: Redis) -> None:
        await fill(redis, 6 * MIB)
        assert " of 8.0 MiB are in use" in (await asyncio.to_thread(report_lines, each_store_url))[4]
        full = (await asyncio.to_thread(lambda: report_lines(each_store_url, max_store_memory=0.5)))[4]
        assert full.startswith("error redis memory: ")
        assert " of 8.0 MiB are in use, so new requests are refused -> raise maxmemory" in full
        await unfill(redis)

    run_on_empty_store(each_store_url, scenario)
    configure(each_store_url)


def test_missing_permissions_of_a_login_are_reported(each_store_url: str) -> None:
    configure(each_store_url)

    async def scenario(redis: Redis) -> None:
        await command(redis, "ACL", "SETUSER", "me", "on", ">secret", "~*", "&*", "+@all", "-eval", "-config", "-info")
        await command(redis, "ACL", "SETUSER", "me", "-role")

    run_on_empty_store(each_store_url, scenario)
    path = each_store_url.removeprefix("unix://")
    listed = report_lines(f"unix://me:secret@{path}")
    assert "secret" not in "".join(listed)
    assert listed[0].startswith(f"warning redis: unix://***@{path} answers in ")
    assert "its version is unknown -> allow the ACL user to run INFO" in listed[0]
    assert listed[1].startswith("warning redis policy: role, cluster-enabled, maxmemory-policy cannot be read -> ")
    assert listed[2].startswith("warning redis durability: appendonly unknown, appendfsync unknown -> allow the ACL")
    assert listed[3].startswith("error redis scripts: ")
    assert listed[3].endswith(" -> allow the ACL user to run scripts on keys fleet:*")


def test_a_wrong_password_is_reported_in_one_line(each_store_url: str) -> None:
    configure(each_store_url)
    (line,) = report_lines(f"unix://me:wrongsecret@{each_store_url.removeprefix('unix://')}")
    assert "invalid username-password pair or user is disabled" in line
    assert "wrongsecret" not in line


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "redis://:secret@127.0.0.1:1/0",
            "error redis: the request store is unavailable: Error 111 connecting to 127.0.0.1:1",
        ),
        ("rediss://:secret@127.0.0.1:1/0", "error redis: the request store is unavailable: "),
        ("redis://:sec#ret@host", "error redis: redis: '***' is not a Redis URL"),
    ],
)
def test_an_unreachable_store_is_reported_in_one_line(url: str, message: str) -> None:
    (line,) = report_lines(url)
    assert line.startswith(message)
    assert "-> check host, port, user, password and TLS of --redis" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("version", "expected"),
    [("4.0.14", "error redis: "), ("6.2.7", "warning redis: "), ("7.0.15", "ok redis: "), ("8.2.1", "ok redis: ")],
)
def test_old_server_versions_are_reported(
    each_store_url: str, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def info(*_: object) -> Mapping[str, Any]:
        return {"redis_version": version}

    configure(each_store_url)
    monkeypatch.setattr(doctor_redis, "_info", info)
    line = report_lines(each_store_url)[0]
    assert line.startswith(expected)
    assert f"Redis {version}" in line


def test_connected_replicas_are_compared_with_store_replicas() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="fleet-replicas-") as directory,
        replicated_servers(Path(directory)) as servers,
    ):
        assert report_lines(servers.url, store_replicas=1)[5].startswith(
            "ok redis replicas: 1 of 1 replicas acknowledged a write in "
        )
        line = report_lines(servers.url, store_replicas=2)[5]
        assert line.startswith("error redis replicas: store_replicas: 1 replicas of the request store acknowledged ")
        assert "(1 are connected) -> start the replicas" in line
        assert report_lines(servers.replica_url)[1].startswith("error redis policy: redis: this server is a replica")


@pytest.mark.parametrize(
    ("skew", "tolerance", "expected"),
    [
        (0.4, 0.001, "ok clock: this host is 0.400 s ahead of the Redis server (±0.001 s)"),
        (-1.5, 1.0, "ok clock: this host is 1.500 s behind the Redis server (±1.000 s)"),
        (-5.0, 0.1, "warning clock: this host is 5.000 s behind the Redis server -> synchronize the clocks of both"),
        (31.0, 0.1, "error clock: this host is 31.000 s ahead of the Redis server, so valid tokens and "),
    ],
)
def test_clock_skew_has_three_severities(skew: float, tolerance: float, expected: str) -> None:
    assert lines([skew_result(skew, tolerance, 30.0)])[0].startswith(expected)


def test_a_fast_clock_is_measured(each_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(each_store_url)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10)
    (line,) = [line for line in report_lines(each_store_url) if " clock: " in line]
    measured = re.match(r"warning clock: this host is (\d+\.\d+) s ahead of the Redis server ", line)
    assert measured, line
    assert 5 < float(measured[1]) < 15  # a slow reply of the server makes the measurement inexact
    (line,) = [line for line in report_lines(each_store_url, jwt_leeway_seconds=5.0) if " clock: " in line]
    assert line.startswith("error clock: ")


@pytest.mark.parametrize("name", sorted(server_binaries()))
def test_a_store_over_tls_is_checked(name: str, fleet_ca: Authority, other_ca: Authority) -> None:
    client = fleet_ca.issue("coordinator")

    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), tls_store(name, fleet_ca) as address:
            url = f"rediss://{address}/0?ssl_certfile={client.cert}&ssl_keyfile={client.key}&ssl_ca_certs="
            listed = await asyncio.to_thread(report_lines, f"{url}{fleet_ca.ca}")
            assert [line.split()[0] for line in listed] == ["ok"] * 7
            (line,) = await asyncio.to_thread(report_lines, f"{url}{other_ca.ca}")
            assert line.startswith("error redis: ")
            assert "certificate verify failed" in line

    asyncio.run(scenario())


def test_the_command_reports_the_store(
    each_store_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(each_store_url, appendonly="no")
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    monkeypatch.setenv("FLEET_ALLOW_DATA_LOSS", "true")
    monkeypatch.setenv("FLEET_STORE_REPLICAS", "1")
    monkeypatch.setattr("common.state.replication._ACKNOWLEDGE_SECONDS", 0.1)
    assert main(["doctor", "--json", "--redis", each_store_url]) == 2
    captured = capsys.readouterr()
    results = {each["check"]: each["status"] for each in json.loads(captured.out)["results"]}
    assert results["redis durability"] == "ok"
    assert results["redis replicas"] == "error"
    assert not captured.err, "log lines about the store must not reach stderr"
    configure(each_store_url)
