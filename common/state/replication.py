"""Runs operations of the script and waits until replicas acknowledge them, for failovers.

WAIT covers the writes of its own connection. It is therefore sent in the same pipeline as the operation, on one
connection. On another connection, WAIT could reach the new primary after a failover, and the new primary may lack the
write.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import Unavailable
from common.state.connection import PREFIX, Arguments, run_script, script_call, script_source, store_errors
from common.state.redis_client import NoScriptError, Redis

_ACKNOWLEDGE_SECONDS = 2.0
_CHANNEL = PREFIX + "replication"


@dataclass(frozen=True)
class Replication:
    """Number of replicas that must acknowledge a write; 0 for none."""

    replicas: int = 0

    async def run_script(self, redis: Redis, operation: str, arguments: Arguments) -> Any:
        """Run an operation of the script. Raises Unavailable if too few replicas acknowledge it in time.

        The operation may have been applied nevertheless. Retry with the same arguments until it is acknowledged.
        """
        if not self.replicas:
            return await run_script(redis, operation, arguments)
        replies = await self._attempt(redis, operation, arguments)
        if isinstance(replies[0], NoScriptError):
            with store_errors():
                await redis.script_load(script_source())
            replies = await self._attempt(redis, operation, arguments)
        with store_errors():
            if isinstance(replies[0], Exception):
                raise replies[0]
        self.check(replies[1:])
        return replies[0]

    async def _attempt(self, redis: Redis, operation: str, arguments: Arguments) -> list[Any]:
        async with redis.pipeline(transaction=False) as pipeline:
            pipeline.execute_command(*script_call(operation, arguments))
            self.follow(pipeline)
            with store_errors():
                return list(await pipeline.execute(raise_on_error=False))

    def follow(self, pipeline: Any, needed: Collection[str] = ()) -> None:
        """Append commands to a pipeline: count `needed` keys, and wait for replicas to acknowledge all writes.

        `needed` are keys that were written before the operation; a failover may have lost them.
        """
        if not self.replicas:
            return
        if needed:
            pipeline.exists(*needed)
        # PUBLISH is replicated. Without PUBLISH, WAIT would not wait after a repeated operation, which writes nothing.
        pipeline.execute_command("PUBLISH", _CHANNEL, b"")
        pipeline.execute_command("WAIT", self.replicas, int(_ACKNOWLEDGE_SECONDS * 1_000))

    def check(self, replies: Sequence[Any], needed: Collection[str] = ()) -> None:
        """Check the replies to the commands of follow(). Raises Unavailable if keys or acknowledgements are missing."""
        if not self.replicas:
            return
        with store_errors():
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        if needed and (found := int(replies[0])) < len(needed):
            raise Unavailable(f"the request store has {found} of {len(needed)} parts of a result: a failover lost some")
        if (acknowledged := int(replies[-1])) < self.replicas:
            raise Unavailable(
                f"store_replicas: {acknowledged} replicas of the request store acknowledged within "
                f"{_ACKNOWLEDGE_SECONDS:g} s, which is less than {self.replicas}; connect more replicas, or retry"
            )
