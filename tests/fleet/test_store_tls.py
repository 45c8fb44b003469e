"""A fleet with a store over TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_tests import run_bounded
from certificates import Authority
from common.errors import InvalidInput, Unavailable
from common.state.connection import connect, ping
from common.state.store_url import without_password
from coordinator_fleet import emoji, running_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import server_binaries
from tls_store import tls_store


@pytest.mark.parametrize("name", sorted(server_binaries()))
def test_fleet_works_with_a_store_over_tls(name: str, fleet_ca: Authority, tmp_path: Path) -> None:
    others, client = Authority(tmp_path, "another authority"), fleet_ca.issue("coordinator")

    async def test() -> None:
        async with tls_store(name, fleet_ca) as address:
            url = f"rediss://{address}/0?ssl_certfile={client.cert}&ssl_keyfile={client.key}&ssl_ca_certs="
            without_certificate = f"rediss://{address}/0?ssl_ca_certs={fleet_ca.ca}"
            for wrong in (f"{url}{others.ca}", without_certificate, f"redis://{address}/0"):
                async with connect(wrong) as redis:
                    with pytest.raises(Unavailable):
                        await ping(redis)
            async with running_fleet(f"{url}{fleet_ca.ca}", emoji()) as running:
                await running.add_workers()
                _, stub = await running.add_coordinator()
                request = (await stub.Submit(submission())).request
                events = await terminal(stub, request.request_id)
                assert events[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_bounded(test)


def test_errors_do_not_contain_the_password_of_the_store() -> None:
    for url in ("redi://me:secret@host:6379/0", "redi://:sec/ret@host/0", "redi://secret@p@host"):
        with pytest.raises(InvalidInput, match="is not a Redis URL") as caught:
            connect(url)
        assert "secret" not in str(caught.value)
        assert "sec/ret" not in str(caught.value)
    assert without_password("redis://host:6379/0") == "redis://host:6379/0"
