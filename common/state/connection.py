"""Access of the state modules to Redis: connection pool, script, and conversion of errors.

The state modules raise Unavailable if the server cannot be reached, refuses the login or does not accept writes,
StoreFull (an Unavailable) if its memory is full, FailedPrecondition for a Redis Cluster, and InternalError if the
server refuses a command for another reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any, TypeAlias, cast

from common.errors import FailedPrecondition, InternalError, InvalidInput, Unavailable
from common.state.interruptible import make_interruptible
from common.state.redis_client import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    ExponentialBackoff,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    Redis,
    RedisError,
    ResponseError,
    Retry,
    Sentinel,
    TimeoutError,
)
from common.state.store_url import SENTINEL, check_url, sentinel_parts, without_password
from common.state.timed_client import TimedClient

PREFIX = "fleet:"
SCRIPT_FILES = (
    "base",
    "slot_index",
    "contracts",
    "admission",
    "requests",
    "leases",
    "scaling",
    "worker_slots",
    "workers",
    "activity",
    "replies",
    "run",
)
"""Files of the script in lua/, in the order in which they are concatenated."""
BLOCK_SECONDS = 5.0
"""Maximum time for which a command blocks on the server. Less than the socket timeout."""
_SOCKET_SECONDS = 10.0
_CONNECT_SECONDS = 3.0
_RETRIES = 2
_UNREACHABLE = (ConnectionError, TimeoutError)
_NO_WRITES = ("MISCONF", "NOREPLICAS", "BUSY", "LOADING", "MASTERDOWN", "READONLY")
_CLUSTER_ERRORS = re.compile(r"MOVED |ASK |CROSSSLOT|CLUSTERDOWN|.*non local key")
CLUSTER_UNSUPPORTED = (
    "redis: this server is part of a Redis Cluster, which the fleet does not support, as its operations change several "
    "keys at once; use one primary, a primary that Sentinel watches (redis+sentinel://), or a managed service with "
    "cluster mode disabled"
)


Word: TypeAlias = str | bytes | int | float
Arguments: TypeAlias = Mapping[str, Word | Sequence[Word] | Mapping[str, Word]]
"""Arguments of an operation of the script by name: single values, lists, and lists of pairs."""


class StoreFull(Unavailable):
    """The server has reached its maxmemory. Writes fail until memory is freed."""


def connect(url: str) -> Redis:
    """Return a client with a connection pool for redis://, rediss:// or unix://. Connections are opened on demand.

    For redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DATABASE, each new connection resolves the primary of the service
    with the sentinels. Raises InvalidInput for other URLs.
    """
    check_url(url)
    try:
        client = _primary(url) if url.startswith(SENTINEL) else TimedClient.from_url(url, **_options())
    except (ValueError, TypeError):
        # Omit the cause, because its message may contain a part of the URL.
        raise InvalidInput("redis: redis-py refuses this URL; percent-encode its parts", field="redis") from None
    make_interruptible(client)
    return client


def _options() -> dict[str, Any]:
    return {
        # Each Watch call occupies a connection while it waits for events. redis-py's default limit is 100.
        "max_connections": 2**31 - 1,
        "protocol": 2,  # independent of redis-py's default, because reply types differ between protocols
        "socket_timeout": _SOCKET_SECONDS,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "retry": Retry(ExponentialBackoff(cap=0.25, base=0.02), _RETRIES),
    }


def follows_sentinels(redis: Redis) -> bool:
    """Return whether this client resolves the server's address with Redis Sentinel."""
    return isinstance(redis, _Primary)


class _Primary(TimedClient):
    """Client of the primary that sentinels resolve. aclose() also closes the connections to the sentinels."""

    watchers: Any

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections to the primary and to the sentinels."""
        await super().aclose(close_connection_pool)
        await self.watchers.aclose()


def _primary(url: str) -> Redis:
    """Return a client of the primary of a service that sentinels monitor."""
    sentinels, service, database = sentinel_parts(url)
    watchers = cast(Any, Sentinel)(
        [(host.strip("[]"), int(port)) for host, port in sentinels],
        sentinel_kwargs={**_options(), "socket_timeout": _CONNECT_SECONDS},
        **_options(),
        db=int(database or 0),
    )
    primary: _Primary = watchers.master_for(service, redis_class=_Primary)
    primary.watchers = watchers
    for sentinel in watchers.sentinels:
        make_interruptible(sentinel)
    return primary


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Raise CancelledError if the task was cancelled within the block, but the cancellation was lost.

    redis-py may raise another error while it closes the connection of a cancelled command, and its asyncio.wait_for()
    drops a cancellation before Python 3.12 (see make_interruptible()). The task would then not end.
    """
    task = asyncio.current_task()
    asked = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > asked:
            raise asyncio.CancelledError


@contextmanager
def store_errors() -> Iterator[None]:
    """Convert errors of Redis to FleetErrors, and preserve cancellation."""
    with cancellation_kept(), _translated():
        yield


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise Unavailable(f"the request store refuses the login: {_text(error)}") from error
    except BusyLoadingError as error:
        raise Unavailable(f"the request store does not accept writes: {_text(error)}") from error
    except _UNREACHABLE as error:
        raise Unavailable(f"the request store is unavailable: {_text(error)}") from error
    except OutOfMemoryError as error:
        raise StoreFull(
            "the request store is full: it has used its maxmemory; raise maxmemory, or wait until results have expired"
        ) from error
    except ReadOnlyError as error:
        raise Unavailable(f"the request store does not accept writes: {_text(error)}") from error
    except ResponseError as error:
        raise _refused(_text(error)) from error
    except RedisError as error:
        raise InternalError(f"the request store failed: {_text(error)}") from error


def _text(error: RedisError) -> str:
    """Return the message of an error, without credentials."""
    return without_password(str(error))


def _refused(text: str) -> Unavailable | FailedPrecondition | InternalError:
    """Return the error for a command that the server refused."""
    if _CLUSTER_ERRORS.match(text):
        return FailedPrecondition(CLUSTER_UNSUPPORTED, field="redis")
    if text.startswith(_NO_WRITES):
        return Unavailable(f"the request store does not accept writes: {text}")
    if text.startswith("FLEETCALL "):
        return InternalError(f"an operation of the request store was called wrongly: {text.partition(' ')[2]}")
    if text.startswith(("FLEETKEY ", "FLEETSTORE ")):
        return InternalError(f"the request store is damaged: {text.partition(' ')[2]}")
    return InternalError(f"the request store refused a command: {text}")


async def command(redis: Redis, *words: str | bytes | memoryview | float) -> Any:
    """Run one command and return its reply, with strings as bytes.

    Raises InternalError with the key if the key has another type than the command requires.
    """
    with store_errors():
        try:
            return await cast(Any, redis).execute_command(*words)
        except ResponseError as error:
            if is_wrong_type(error) and isinstance(words[1], str):
                raise InternalError(
                    f"the request store is damaged: {words[1]} has another type than the command reads; delete that key"
                ) from error
            raise


def is_wrong_type(error: object) -> bool:
    """Return whether a command failed because its key has another type."""
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


async def ping(redis: Redis) -> None:
    """Raise Unavailable unless the server responds."""
    await command(redis, "PING")


@cache
def script_source() -> str:
    """Return the source of the script."""
    folder = resources.files(__package__).joinpath("lua")
    return "\n".join(folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in SCRIPT_FILES)


@cache
def script_sha() -> str:
    """Return the SHA-1 digest by which EVALSHA calls the script."""
    return hashlib.sha1(script_source().encode(), usedforsecurity=False).hexdigest()


def script_call(operation: str, arguments: Arguments) -> list[Word]:
    """Return the command that runs an operation of the script, with its arguments as NAME VALUE pairs.

    A list is sent as one pair per element, so that an empty list is omitted.
    """
    words: list[Word] = ["EVALSHA", script_sha(), 0, operation]
    for name, value in arguments.items():
        for each in _elements(value):
            words += (name, each)
    return words


def _elements(value: Word | Sequence[Word] | Mapping[str, Word]) -> Sequence[Word]:
    if isinstance(value, Mapping):
        return [word for pair in value.items() for word in pair]
    return [value] if isinstance(value, str | bytes | int | float) else value


async def run_script(redis: Redis, operation: str, arguments: Arguments) -> Any:
    """Run an operation of the script in one round trip, or three if the server must load the script first.

    Raises InternalError for arguments that the operation does not declare.
    """
    words = script_call(operation, arguments)
    with store_errors():
        try:
            return await cast(Any, redis).execute_command(*words)
        except NoScriptError:
            await redis.script_load(script_source())
            return await cast(Any, redis).execute_command(*words)
