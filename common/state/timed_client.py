"""Redis client that measures the duration of each round trip by operation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from common.metrics import STORE_SECONDS, observe
from common.state.redis_client import NoScriptError, Pipeline, Redis, RedisError


@contextmanager
def _round_trip(operation: str) -> Iterator[list[Any]]:
    """Observe a round trip, as failed if the block raises or adds an error to the yielded list of replies."""
    began, result = time.perf_counter(), "error"
    replies: list[Any] = []
    try:
        yield replies
        result = "error" if _has_error(replies) else "ok"
    except asyncio.CancelledError:
        result = "cancelled"
        raise
    finally:
        observe(STORE_SECONDS.labels(operation, result), time.perf_counter() - began)


def _has_error(replies: Iterable[Any]) -> bool:
    """Return whether a command of a pipeline or nested transaction failed. NOSCRIPT does not count: it is retried."""
    return any(
        _has_error(each)
        if isinstance(each, list)
        else isinstance(each, RedisError) and not isinstance(each, NoScriptError)
        for each in replies
    )


def _operation(words: tuple[Any, ...]) -> str:
    """Return the operation of the fleet's script that a command runs, or the command's name."""
    return str(words[3] if words[0] == "EVALSHA" else words[0])


class TimedClient(Redis):
    """Client whose commands and pipelines are measured. A pipeline is one operation, named `pipeline`."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run a command."""
        with _round_trip(_operation(args)):
            return await cast(Any, super()).execute_command(*args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """Return a pipeline whose execution is measured."""
        return _TimedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _TimedPipeline(Pipeline):
    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send all commands."""
        with _round_trip("pipeline") as replies:
            replies += await super().execute(raise_on_error)
            return replies
