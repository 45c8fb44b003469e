"""Redis, as the state modules use it: one pool, one script, and errors that callers understand.

The state modules raise Unavailable while the server cannot be reached or takes no writes, StoreFull (an Unavailable)
when its memory is full, FailedPrecondition for a Redis Cluster, and InternalError when it refuses a command.
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
"""The files of the script in lua/, in the order in which they make one chunk."""
# No command blocks longer on the server than this; the socket's own timeout is beyond it.
BLOCK_SECONDS = 5.0
_SOCKET_SECONDS = 10.0
_CONNECT_SECONDS = 3.0
_RETRIES = 2
_AWAY = (ConnectionError, TimeoutError)
_NO_WRITES = ("MISCONF", "NOREPLICAS", "BUSY", "LOADING", "MASTERDOWN", "READONLY")
_CLUSTER_ERRORS = re.compile(r"MOVED |ASK |CROSSSLOT|CLUSTERDOWN|.*non local key")
CLUSTER_UNSUPPORTED = (
    "redis: this server is part of a Redis Cluster, which the fleet does not support, as its operations change several "
    "keys at once; use one primary, a primary that Sentinel watches (redis+sentinel://), or a managed service with "
    "cluster mode disabled"
)


Word: TypeAlias = str | bytes | int | float
Arguments: TypeAlias = Mapping[str, Word | Sequence[Word] | Mapping[str, Word]]
"""The arguments of an operation of the script by name: single values, lists, and lists of pairs."""


class StoreFull(Unavailable):
    """The server has used all of its maxmemory; writes work again once it has free memory."""


def connect(url: str) -> Redis:
    """A client of redis://, rediss:// or unix:// with a pool of connections; nothing is opened yet.

    redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DATABASE asks the sentinels who the service's primary is, whenever it
    connects. Raises InvalidInput for a URL that is none of these.
    """
    check_url(url)
    try:
        return _primary(url) if url.startswith(SENTINEL) else TimedClient.from_url(url, **_options())
    except (ValueError, TypeError):
        # Without the cause, whose text may hold a part of the URL.
        raise InvalidInput("redis: redis-py refuses this URL; percent-encode its parts", field="redis") from None


def _options() -> dict[str, Any]:
    return {
        # Each Watch holds a connection while it waits for events. redis-py's default limit is 100.
        "max_connections": 2**31 - 1,
        "protocol": 2,  # so that replies have one form, whatever redis-py's default
        "socket_timeout": _SOCKET_SECONDS,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "retry": Retry(ExponentialBackoff(cap=0.25, base=0.02), _RETRIES),
    }


def follows_sentinels(redis: Redis) -> bool:
    """Whether sentinels name the server that this client connects to."""
    return isinstance(redis, _Primary)


class _Primary(TimedClient):
    """The primary that sentinels name. Closing it closes the connections to the sentinels too."""

    watchers: Any

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close everything."""
        await super().aclose(close_connection_pool)
        await self.watchers.aclose()


def _primary(url: str) -> Redis:
    """A client of the primary of a service that sentinels watch."""
    places, service, database = sentinel_parts(url)
    watchers = cast(Any, Sentinel)(
        [(host.strip("[]"), int(port)) for host, port in places],
        sentinel_kwargs={**_options(), "socket_timeout": _CONNECT_SECONDS},
        **_options(),
        db=int(database or 0),
    )
    primary: _Primary = watchers.master_for(service, redis_class=_Primary)
    primary.watchers = watchers
    return primary


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Raise CancelledError when the task was cancelled within the block and something in there swallowed it.

    redis-py sends under asyncio.wait_for, which until Python 3.12 returns a result that comes at the same moment as a
    cancellation, and forgets the cancellation: whoever waits for the task's end then waits for ever.
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
    """Turn Redis's errors into the fleet's, and lose no cancellation."""
    with cancellation_kept(), _translated():
        yield


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise Unavailable(f"the request store refuses the login: {_text(error)}") from error
    except BusyLoadingError as error:
        raise Unavailable(f"the request store takes no writes: {_text(error)}") from error
    except _AWAY as error:
        raise Unavailable(f"the request store is away: {_text(error)}") from error
    except OutOfMemoryError as error:
        raise StoreFull(
            "the request store is full: it has used its maxmemory; raise maxmemory, or wait until results have expired"
        ) from error
    except ReadOnlyError as error:
        raise Unavailable(f"the request store takes no writes: {_text(error)}") from error
    except ResponseError as error:
        raise _refused(_text(error)) from error
    except RedisError as error:
        raise InternalError(f"the request store failed: {_text(error)}") from error


def _text(error: RedisError) -> str:
    """The error's text without credentials."""
    return without_password(str(error))


def _refused(text: str) -> Unavailable | FailedPrecondition | InternalError:
    """The error of a command that the server refused."""
    if _CLUSTER_ERRORS.match(text):
        return FailedPrecondition(CLUSTER_UNSUPPORTED, field="redis")
    if text.startswith(_NO_WRITES):
        return Unavailable(f"the request store takes no writes: {text}")
    if text.startswith("FLEETCALL "):
        return InternalError(f"an operation of the request store was called wrongly: {text.partition(' ')[2]}")
    if text.startswith(("FLEETKEY ", "FLEETSTORE ")):
        return InternalError(f"the request store is damaged: {text.partition(' ')[2]}")
    return InternalError(f"the request store refused a command: {text}")


async def command(redis: Redis, *words: str | bytes | memoryview | float) -> Any:
    """Run one command; its reply is as the server gives it, texts as bytes.

    Raises InternalError that names the key where that has another type than the command's.
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
    """Whether a command failed since its key holds a value of another type."""
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


async def ping(redis: Redis) -> None:
    """Raise Unavailable unless the server answers."""
    await command(redis, "PING")


@cache
def script_source() -> str:
    """The text of the script."""
    folder = resources.files(__package__).joinpath("lua")
    return "\n".join(folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in SCRIPT_FILES)


@cache
def script_sha() -> str:
    """The name under which the server keeps the script."""
    return hashlib.sha1(script_source().encode(), usedforsecurity=False).hexdigest()


def script_call(operation: str, arguments: Arguments) -> list[Word]:
    """The command that runs an operation of the script, whose arguments are sent as NAME VALUE pairs.

    A list repeats its name for each element, so that an empty list is not sent.
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
    """Run an operation of the script: one round trip, and one more where the server does not know the script yet.

    Raises InternalError for arguments that the operation does not take.
    """
    words = script_call(operation, arguments)
    with store_errors():
        try:
            return await cast(Any, redis).execute_command(*words)
        except NoScriptError:
            await redis.script_load(script_source())
            return await cast(Any, redis).execute_command(*words)
