"""Stores requests, their events and their results, shared by all coordinators.

A request is admitted once, gets events and ends once; its last event contains the terminal state. After the end of a
request, all its keys expire. Records and events are serialized messages of the public API.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from common.errors import InvalidInput, ResourceExhausted
from common.scaling import StageWork
from common.state.admission import check_admitted
from common.state.connection import (
    BLOCK_SECONDS,
    PREFIX,
    Arguments,
    StoreFull,
    command,
    is_wrong_type,
    run_script,
    script_call,
    store_errors,
)
from common.state.records import (
    CHUNK_BYTES,
    SNAPSHOT,
    Cancellation,
    ResultFile,
    State,
    StateValue,
    batches_of,
    chunks_of,
    is_terminal,
    key_of,
    read_event,
    read_record,
    state_event,
    unknown_request,
    with_ids,
)
from common.state.redis_client import NoScriptError, Redis
from common.state.replication import Replication
from common.state.result_items import ResultItems, StoredItem, read_chunks
from common.state.store_server import StoreMemory
from common.state.timeline import Timelines
from common.wiring import Wiring
from fleet.v1 import generation_pb2

MAX_PAGE = 1000
PAGE_BYTES = 3 << 20
"""Maximum size of a page in bytes, below the default message limit of gRPC clients, 4 MiB."""
_DEFAULT_PAGE = 50
_FULL_RETRY_SECONDS = 5.0
_RECORD_BYTES = 4 << 10  # estimated size of an admitted request in the store, without its submission
_SCAN = 200
_ENTRY_BYTES = 8  # tag and length of a record in its page
_UNSUCCESSFUL_SECONDS = 60.0
"""Maximum TTL of the items of a request that ended without a result, for downloads in progress."""
_EVENT_ID = re.compile(r"\d{1,20}-\d{1,20}")


@dataclass(frozen=True)
class AdmissionLimits:
    """Limits of admission: open requests of a model, waiting claims of a service, outstanding work."""

    services: Sequence[str] = ()
    max_open: int = 1_000
    queue_limit: int = 256
    max_open_of_caller: int = 1_000
    queue_seconds: float = 0.0
    """Maximum outstanding work of the slowest service in seconds, at its measured pace; 0 for no limit.

    A caller whose outstanding work is at most an equal share of the limit is not refused. While a service has no
    measured pace, the number of open requests is limited to its capacity."""


@dataclass(frozen=True)
class Retention:
    """TTL of the records and of the result files of ended requests, in seconds."""

    record_seconds: float = 86_400.0
    result_seconds: float = 3_600.0


class Admission(NamedTuple):
    """An accepted request. `seconds_left` is the time to its deadline, by the store's clock.

    `seconds_left` is None without a deadline and for a replayed request. `events` are the first stored events; empty if
    the admission was a repetition or the request is replayed.
    """

    record: generation_pb2.RequestRecord
    replayed: bool
    seconds_left: float | None
    events: list[generation_pb2.Event]


class StoredEvent(NamedTuple):
    """An event, and the epoch of the owner that added it; 0 for an event of admit() or request_cancel()."""

    event: generation_pb2.Event
    epoch: int


class RequestStore:
    """Request state of one fleet.

    `owner`: id of the coordinator that owns requests admitted by this object. `memory`: memory limit of admission.
    `items`: bytes of streamed results. `timelines`: timelines of requests.

    admit() and finish() return once `replicas` replicas of the store have acknowledged the write. They raise
    Unavailable if fewer replicas acknowledge it. The write may have been applied nevertheless: retry with the same
    arguments.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        owner: str = "",
        retention: Retention | None = None,
        replicas: int = 0,
        memory: StoreMemory | None = None,
    ) -> None:
        self._replication = Replication(replicas)
        self._redis = redis
        self.items = ResultItems(redis, self._replication)
        self.timelines = Timelines(redis)
        self.memory = memory or StoreMemory(redis)
        self._owner = owner
        self._retention = retention or Retention()

    async def admit(
        self,
        record: generation_pb2.RequestRecord,
        *,
        idempotency_key: str = "",
        submission: bytes = b"",
        limits: AdmissionLimits | None = None,
        costs: Mapping[str, int] = MappingProxyType({}),
        work: Mapping[str, StageWork] = MappingProxyType({}),
        wirings: Mapping[str, Wiring] = MappingProxyType({}),
    ) -> Admission:
        """Store a request with its first events: QUEUED, and its warnings.

        Takes one round trip. Once per second, a second round trip reads the memory usage of the store.

        `idempotency_key`: for a known key of this caller, its request is returned.
        `submission`: serialized inputs with which another coordinator can run the request.
        `costs`: relative work at each service, default 1.
        `work`: work at each service, for autoscaling.
        `wirings`: wiring at each service. Capacities include only workers that fit the wiring.

        Raises InvalidInput for a deadline that has passed, and ResourceExhausted with a retry delay if a limit is
        reached or the store is full.
        """
        limits = limits or AdmissionLimits()
        memory = await self.memory.use(adding=len(submission) + _RECORD_BYTES)
        events = [state_event(State.REQUEST_STATE_QUEUED)]
        events += [generation_pb2.Event(warning=warning) for warning in record.warnings]
        deadline = record.deadline.ToMilliseconds() if record.HasField("deadline") else 0
        arguments: Arguments = {
            "id": record.request_id,
            "model": record.model,
            "caller": record.caller,
            "owner": self._owner,
            "variant": record.variant,
            "record": record.SerializeToString(),
            "submission": submission,
            "idempotency_key": idempotency_key and f"{record.caller}/{idempotency_key}",
            "deadline": deadline,
            "max_open": limits.max_open,
            "max_open_of_caller": limits.max_open_of_caller,
            "max_queued": limits.queue_limit,
            "max_work": int(limits.queue_seconds * 1_000),
            "is_full": int(memory.is_full),
            "costs": {service: costs.get(service, 1) for service in limits.services},
            "work": {service: str(each) for service, each in work.items()},
            "wirings": {service: each.text for service, each in wirings.items()},
            "events": [event.SerializeToString() for event in events],
        }
        try:
            reply = await self._replication.run_script(self._redis, "admit", arguments)
        except StoreFull as error:
            raise ResourceExhausted(str(error), retry_seconds=_FULL_RETRY_SECONDS) from error
        if reply[0] == b"memory":
            raise ResourceExhausted(
                f"the request store is full: it uses {memory}, and accepts requests below {memory.limit / 2**20:.1f} "
                "MiB; accepted requests continue to run",
                retry_seconds=_FULL_RETRY_SECONDS,
            )
        check_admitted(reply, record)
        stored = read_record(reply[2])
        left = (deadline - int(reply[1])) / 1_000 if deadline and reply[0] == b"admitted" else None
        ids = reply[3] if reply[0] == b"admitted" else []
        return Admission(stored, reply[0] == b"replayed", left, with_ids(events, ids))

    async def get(self, request_id: str) -> generation_pb2.RequestRecord:
        """Return the record of a request. Raises NotFound."""
        fields = await command(self._redis, "HMGET", key_of("request", request_id), *SNAPSHOT)
        if fields[0] is None:
            raise unknown_request(request_id, self._retention.record_seconds)
        return read_record(fields)

    async def page(
        self,
        *,
        page_size: int = 0,
        page_token: str = "",
        state: StateValue = State.REQUEST_STATE_UNSPECIFIED,
        model: str = "",
        caller: str = "",
    ) -> tuple[list[generation_pb2.RequestRecord], str]:
        """Return a page of records, newest first, and the token of the next page; empty on the last page.

        A page has at most `page_size` records and PAGE_BYTES, but at least one record. Raises InvalidInput for an
        invalid size or token.
        """
        wanted = checked_page_size(page_size)
        if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) < 16):
            raise InvalidInput(f"page_token: {page_token!r} is not the token of an earlier page", field="page_token")
        below = f"({page_token}" if page_token else "+inf"
        found: list[generation_pb2.RequestRecord] = []
        last, size = "", 0
        while True:
            batch = await self._scan(below)
            for number, fields in batch:
                if fields[0] is None or (state and int(fields[2]) != state) or (model and fields[5].decode() != model):
                    continue
                if caller and (fields[6] or b"").decode() != caller:
                    continue
                record = read_record(fields)
                size += record.ByteSize() + _ENTRY_BYTES
                if len(found) == wanted or (found and size > PAGE_BYTES):
                    return found, last
                found.append(record)
                last = number
            if len(batch) < _SCAN:
                return found, ""
            below = f"({batch[-1][0]}"

    async def _scan(self, below: str) -> list[tuple[str, list[Any]]]:
        """Return the next entries of the index: sequence numbers, and stored fields of their requests."""
        with store_errors():
            rows: Any = await self._redis.zrevrangebyscore(
                PREFIX + "requests", below, "-inf", start=0, num=_SCAN, withscores=True
            )
        if not rows:
            return []
        with store_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for request_id, _ in rows:
                    pipeline.hmget(key_of("request", request_id.decode()), (*SNAPSHOT, "model", "caller"))
                replies = await pipeline.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception) and not is_wrong_type(reply):
                    raise reply
        fields = [[None] if isinstance(reply, Exception) else reply for reply in replies]
        return [(str(int(score)), each) for (_, score), each in zip(rows, fields, strict=True)]

    async def append(
        self, request_id: str, events: Sequence[generation_pb2.Event], *, number: int, epoch: int = 1
    ) -> list[generation_pb2.Event] | None:
        """Add events to a request. A state change updates the record, and warnings are appended to the record.

        `number` is the number of events that the caller has added before in this epoch, which makes repetitions
        idempotent. Returns the stored events, or None if the request has ended or the epoch is not current. Events of
        items must be acknowledged by replicas, because clients receive the bytes of the items afterwards.
        """
        state = next((str(event.state_change.state) for event in events if event.HasField("state_change")), "")
        extra = generation_pb2.RequestRecord(
            warnings=[event.warning for event in events if event.HasField("warning")]
        ).SerializeToString()
        arguments: Arguments = {
            "id": request_id,
            "epoch": epoch,
            "number": number,
            "state": state,
            "extra": extra,
            "events": [event.SerializeToString() for event in events],
            "done": _done(events),
        }
        if any(event.HasField("item") for event in events):
            reply = await self._replication.run_script(self._redis, "append", arguments)
        else:
            reply = await run_script(self._redis, "append", arguments)
        return with_ids(events, reply[1]) if reply[0] == b"appended" else None

    async def finish(
        self,
        request_id: str,
        state: StateValue,
        *,
        error: generation_pb2.Error | None = None,
        files: Sequence[ResultFile] = (),
        stored: bool = True,
        items: Sequence[StoredItem] = (),
        events: Sequence[generation_pb2.Event] = (),
        steps_saved: int = 0,
        epoch: int = 1,
        token: str = "",
    ) -> list[generation_pb2.Event] | None:
        """End a request: store its files, the pending `events` and the terminal state.

        Returns the stored events, the terminal event last (empty for a repetition), or None if the request has already
        ended or the epoch is not current. `token`: id of the call; a repetition after a lost reply must have the same
        token, since a call with another token deletes the files. `stored`: False to add the files to the record without
        storing their bytes. `items`: items of a streamed result, which expire with the result.
        """
        extra = generation_pb2.RequestRecord(
            error=error,
            files=[file.header for file in files],
            warnings=[event.warning for event in events if event.HasField("warning")],
            steps_saved=steps_saved,
        )
        last = state_event(state, error, steps_saved=steps_saved)
        arguments: Arguments = {
            "id": request_id,
            "epoch": epoch,
            "state": str(state),
            "token": token or secrets.token_hex(8),
            "extra": extra.SerializeToString(),
            "keep": _milliseconds(self._retention.record_seconds),
            "events": [event.SerializeToString() for event in (*events, last)],
        }
        chunks = {
            key_of("result", request_id, epoch, index, number): chunk
            for index, file in enumerate(files if stored else ())
            for number, chunk in enumerate(chunks_of(file.pieces))
        }
        reply = await self._store_then_run(chunks, "finish", arguments)
        if reply[0] == b"finished":
            # Not before the operation: a former owner must not expire the items of a running request.
            await self.items.expire(request_id, items, self._item_milliseconds(state))
            return with_ids((*events, last), reply[1])
        if chunks:
            with store_errors():
                await self._redis.delete(*chunks)
        return None

    def _item_milliseconds(self, state: StateValue) -> int:
        seconds = self._retention.result_seconds
        succeeded = state == State.REQUEST_STATE_SUCCEEDED
        return _milliseconds(seconds if succeeded else min(seconds, _UNSUCCESSFUL_SECONDS))

    async def _store_then_run(self, chunks: Mapping[str, memoryview], operation: str, arguments: Arguments) -> Any:
        """Write chunks idempotently, then run an operation. One round trip for at most one batch of chunks.

        The last batch and the operation are a transaction, which a full server aborts as a whole: a request must not
        succeed without its files.
        """
        if not chunks:
            return await self._replication.run_script(self._redis, operation, arguments)
        ttl = _milliseconds(self._retention.result_seconds)
        *early, last = batches_of(chunks)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for batch in early:
                for key, chunk in batch.items():
                    pipeline.set(key, chunk, px=ttl)
                with store_errors():
                    await pipeline.execute()
            # Not a transaction of redis-py, which would include WAIT: within a transaction, WAIT does not wait.
            pipeline.execute_command("MULTI")
            for key, chunk in last.items():
                pipeline.set(key, chunk, px=ttl)
            pipeline.execute_command(*script_call(operation, arguments))
            pipeline.execute_command("EXEC")
            self._replication.follow(pipeline, chunks)
            with store_errors():
                replies = await pipeline.execute(raise_on_error=False)
        queued, executed, rest = replies[: len(last) + 2], replies[len(last) + 2], replies[len(last) + 3 :]
        # EXEC of an aborted transaction returns one error; the command that caused the abort has a separate error.
        *stored, reply = executed if isinstance(executed, list) else [executed]
        with store_errors():
            for each in (*queued, *stored):
                if isinstance(each, Exception):
                    raise each
            if isinstance(reply, NoScriptError):
                return await self._replication.run_script(self._redis, operation, arguments)
            if isinstance(reply, Exception):
                raise reply
        self._replication.check(rest, chunks)
        return reply

    async def request_cancel(self, request_id: str, *, token: str = "") -> Cancellation:
        """Ask the owner of a request to cancel it, or cancel it here if its owner is lost. Raises NotFound.

        No effect on a request that has ended. `token`: id of the call; a repetition after a lost reply must have the
        same token.
        """
        state = State.REQUEST_STATE_CANCELLED
        arguments: Arguments = {
            "id": request_id,
            "state": str(state),
            "token": token or secrets.token_hex(8),
            "keep": _milliseconds(self._retention.record_seconds),
            "events": [state_event(state).SerializeToString()],
        }
        ended_here, fields = await run_script(self._redis, "cancel", arguments)
        if fields[0] is None:
            raise unknown_request(request_id, self._retention.record_seconds)
        return Cancellation(read_record(fields), bool(ended_here))

    async def events(self, request_id: str, after: str = "") -> AsyncGenerator[generation_pb2.Event, None]:
        """Yield the events after the id `after`, up to the terminal event. Raises NotFound, InvalidInput."""
        async with aclosing(self.stored_events(request_id, after)) as events:
            async for event, _ in events:
                yield event

    async def stored_events(self, request_id: str, after: str = "") -> AsyncGenerator[StoredEvent, None]:
        """Yield the same events as events(), each with its epoch. Raises the same errors."""
        if after and not _EVENT_ID.fullmatch(after):
            raise InvalidInput(f"after_event_id: {after!r} is not the id of an event", field="after_event_id")
        last = after or "0-0"
        rows, over = await self._history(request_id, last)
        while True:
            for entry_id, fields in rows:
                last = entry_id.decode()
                event = read_event(last, fields[b"event"])
                yield StoredEvent(event, _epoch_of(fields))
                if is_terminal(event.state_change.state):
                    return
            if over:
                return
            rows = await self._wait(request_id, last)
            if not rows:
                rows, over = await self._history(request_id, last)

    async def _history(self, request_id: str, last: str) -> tuple[list[Any], bool]:
        """Return the entries after `last`, and whether the request has ended, read in one transaction."""
        with store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.hget(key_of("request", request_id), "state")
                pipeline.xrange(key_of("events", request_id), min=f"({last}")
                state, rows = await pipeline.execute()
        if state is None:
            raise unknown_request(request_id, self._retention.record_seconds)
        return rows, is_terminal(int(state))

    async def _wait(self, request_id: str, last: str) -> list[Any]:
        key = key_of("events", request_id)
        with store_errors():
            reply: Any = await self._redis.xread({key: last}, block=int(BLOCK_SECONDS * 1_000))
        return list(reply[0][1]) if reply else []

    async def delivered_items(self, request_id: str) -> list[StoredItem]:
        """Return the items of a request that have an event, in order."""
        rows = await command(self._redis, "XRANGE", key_of("events", request_id), "-", "+")
        events = [(generation_pb2.Event.FromString(fields[b"event"]), _epoch_of(fields)) for _, fields in rows]
        return [StoredItem(event.item, epoch) for event, epoch in events if event.HasField("item")]

    async def result_chunks(
        self, request_id: str, index: int, byte_size: int, skipped: int = 0
    ) -> AsyncIterator[bytes]:
        """Yield the bytes of a stored file from the offset `skipped`, in chunks of at most 1 MiB.

        Raises NotFound if they have expired.
        """
        epoch = (await command(self._redis, "HGET", key_of("request", request_id), "epoch") or b"").decode()
        count = len(range(0, byte_size, CHUNK_BYTES))
        keys = [key_of("result", request_id, epoch, index, number) for number in range(count)]
        async for chunk in read_chunks(self._redis, request_id, keys, skipped):
            yield chunk


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1_000))


def checked_page_size(size: int) -> int:
    """Return the maximum number of records of a page; the default for 0.

    Raises InvalidInput for a size that is not from 0 to MAX_PAGE.
    """
    if not 0 <= size <= MAX_PAGE:
        raise InvalidInput(f"page_size: {size} is not from 0 to {MAX_PAGE}; {_DEFAULT_PAGE} works", field="page_size")
    return size or _DEFAULT_PAGE


def _done(events: Sequence[generation_pb2.Event]) -> dict[str, str]:
    """Return the completed fraction of each service's work, from its latest progress."""
    steps = [event.progress for event in events if event.HasField("progress") and event.progress.total_steps]
    return {each.service: f"{each.step / each.total_steps:.6f}" for each in steps}


def _epoch_of(fields: Mapping[bytes, bytes]) -> int:
    return int(fields.get(b"epoch") or 0)
