"""What stands between the state modules and redis-py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError

from common.errors import Unavailable
from common.state.connection import command, connect, store_errors
from redis_servers import running_server, until


def test_a_cancellation_at_the_moment_of_the_reply_is_not_lost() -> None:
    async def story() -> None:
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def ask() -> None:
            with store_errors():
                await asyncio.wait_for(reply, 60)

        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        reply.set_result(None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())


def test_a_cancellation_outlives_an_error() -> None:
    async def story() -> None:
        async def ask() -> None:
            with store_errors():
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    raise ConnectionError("closed by its own clean-up") from None

        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())


def test_work_that_goes_on_after_a_cancellation_may_ask() -> None:
    async def story() -> list[str]:
        received: list[str] = []

        async def ask() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                with store_errors():
                    await asyncio.sleep(0)
                received.append("released")
                raise

        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return received

    assert asyncio.run(story()) == ["released"]


def test_a_store_that_is_away_is_unavailable() -> None:
    async def story() -> None:
        with pytest.raises(Unavailable, match="unavailable: refused"), store_errors():
            raise ConnectionError("refused")

    asyncio.run(story())


def test_many_readers_may_wait_at_once() -> None:
    async def story(url: str) -> None:
        redis: Any = connect(url)
        readers = [asyncio.ensure_future(redis.xread({"none": "$"}, block=60_000)) for _ in range(250)]

        async def all_wait() -> bool:
            assert not [each for each in readers if each.done()]
            return bool((await command(redis, "INFO", "clients"))["blocked_clients"] == len(readers))

        await until(all_wait)
        for each in readers:
            each.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await redis.aclose()

    with running_server("valkey") as server:
        asyncio.run(story(server.url))
