"""Errors and cancellations of store calls, and connections of many blocked readers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from async_tests import HANG_SECONDS, wait_until
from common.errors import Unavailable
from common.state.connection import command, connect, store_errors
from redis_servers import running_server


def test_a_cancellation_at_the_moment_of_the_reply_is_not_lost() -> None:
    async def scenario() -> None:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def call_store() -> None:
            with store_errors():
                await asyncio.wait_for(reply, HANG_SECONDS)

        task = asyncio.create_task(call_store())
        await asyncio.sleep(0)
        reply.set_result(None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_a_cancellation_has_precedence_over_an_error() -> None:
    async def scenario() -> None:
        async def call_store() -> None:
            with store_errors():
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    raise ConnectionError("closed by its own clean-up") from None

        task = asyncio.create_task(call_store())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_a_clean_up_after_a_cancellation_may_call_the_store() -> None:
    async def scenario() -> list[str]:
        received: list[str] = []

        async def call_store() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                with store_errors():
                    await asyncio.sleep(0)
                received.append("released")
                raise

        task = asyncio.create_task(call_store())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return received

    assert asyncio.run(scenario()) == ["released"]


def test_a_connection_error_becomes_unavailable() -> None:
    async def scenario() -> None:
        with pytest.raises(Unavailable, match="unavailable: refused"), store_errors():
            raise ConnectionError("refused")

    asyncio.run(scenario())


def test_250_readers_may_block_at_once() -> None:
    async def scenario(url: str) -> None:
        redis: Any = connect(url)
        readers = [asyncio.ensure_future(redis.xread({"none": "$"}, block=60_000)) for _ in range(250)]

        async def all_wait() -> bool:
            assert not [each for each in readers if each.done()]
            return bool((await command(redis, "INFO", "clients"))["blocked_clients"] == len(readers))

        await wait_until(all_wait)
        for each in readers:
            each.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await redis.aclose()

    with running_server("valkey") as server:
        asyncio.run(scenario(server.url))
