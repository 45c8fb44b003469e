"""Errors and cancellations of store calls, and connections of many blocked readers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from chaos_links import Link
from redis.asyncio.connection import AbstractConnection
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


def cancel_after_sending(
    monkeypatch: pytest.MonkeyPatch, task: asyncio.Task[Any], error: Exception | None = None
) -> None:
    """Cancel the task at the moment at which redis-py has sent a command; the sending then raises `error`."""
    send = AbstractConnection._send_packed_command

    async def send_and_cancel(connection: AbstractConnection, words: Any) -> None:
        await send(connection, words)
        if not task.cancelling():
            task.cancel()
            if error is not None:
                raise error

    monkeypatch.setattr(AbstractConnection, "_send_packed_command", send_and_cancel)


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
def test_a_cancellation_at_the_end_of_sending_does_not_wait_for_the_reply(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server never replies; the socket timeout is 10 s."""

    async def scenario() -> None:
        link = Link(tmp_path / "silent")
        await link.start()
        link.hold()
        async with connect(f"redis://{link.address}/0") as redis:
            task = asyncio.create_task(command(redis, "PING"))
            cancel_after_sending(monkeypatch, task, error)
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled()
        await link.close()

    asyncio.run(scenario())


def test_a_connection_is_not_used_again_after_a_cancellation(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command must not receive the reply to the cancelled command."""

    async def scenario() -> None:
        async with connect(store_url) as redis:
            await command(redis, "PING")
            task = asyncio.create_task(command(redis, "BLPOP", "nothing", "0.2"))
            with monkeypatch.context() as patch:
                cancel_after_sending(patch, task)
                await asyncio.wait({task})
            assert task.cancelled()
            assert await command(redis, "ECHO", "next") == b"next"

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
