"""A typed client of GenerationService; every failure is raised as a FleetError."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVar

import grpc

from common.errors import FleetError, Unavailable
from common.rpc.address import proxy_variable
from common.rpc.client import open_channel
from common.rpc.status import from_rpc_error, is_sent_by_peer
from fleet.v1 import generation_pb2, generation_pb2_grpc
from services.cli.access import IN_THE_CLEAR, Access

Responses = AsyncGenerator[generation_pb2.GenerateResponse, None]
Events = AsyncGenerator[generation_pb2.Event, None]
Downloaded = AsyncGenerator[generation_pb2.DownloadResultResponse, None]

RETRIES = 5
"""Maximum number of consecutive retries without a message from a coordinator."""

T = TypeVar("T")

TERMINAL = frozenset(
    {
        generation_pb2.REQUEST_STATE_SUCCEEDED,
        generation_pb2.REQUEST_STATE_FAILED,
        generation_pb2.REQUEST_STATE_CANCELLED,
        generation_pb2.REQUEST_STATE_EXPIRED,
    }
)


class RequestFailed(FleetError):
    """The request ended without a result."""


class FleetClient:
    """A client of GenerationService at one endpoint; connect() creates it."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel, *, api_key: str = "", is_tls: bool = False) -> None:
        self._endpoint = endpoint
        self._is_tls = is_tls
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)

    async def generate(self, request: generation_pb2.SubmitRequest, *, follow: bool = False) -> Responses:
        """Submit a request, and yield its events and files. Closing early cancels a request without idempotency key."""
        call = self._stub.Generate(
            generation_pb2.GenerateRequest(request=request, follow=follow), metadata=self._metadata
        )
        try:
            with self._translated():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def watch(self, request_id: str, after: str = "") -> Events:
        """Yield the events of a request after the event ID `after`, until its terminal state."""
        call = self._stub.Watch(
            generation_pb2.WatchRequest(request_id=request_id, after_event_id=after), metadata=self._metadata
        )
        try:
            with self._translated():
                async for response in call:
                    yield response.event
        finally:
            call.cancel()

    async def download(self, request_id: str, index: int, offset: int) -> Downloaded:
        """Yield the bytes of a result file from `offset` to its end. Follows a growing file."""
        request = generation_pb2.DownloadResultRequest(request_id=request_id, index=index, offset=offset, follow=True)
        call = self._stub.DownloadResult(request, metadata=self._metadata)
        try:
            with self._translated():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def get(self, request_id: str) -> generation_pb2.RequestRecord:
        """The record of a request."""
        with self._translated():
            response = await self._stub.GetRequest(
                generation_pb2.GetRequestRequest(request_id=request_id), metadata=self._metadata
            )
        return response.request

    async def timeline(self, request_id: str) -> generation_pb2.GetRequestResponse:
        """The record and timeline of a request."""
        with self._translated():
            request = generation_pb2.GetRequestRequest(request_id=request_id, with_timeline=True)
            return await self._stub.GetRequest(request, metadata=self._metadata)

    async def cancel(self, request_id: str) -> generation_pb2.RequestRecord:
        """Request cancellation. Returns the current record, whose state may not be terminal yet."""
        with self._translated():
            response = await self._stub.CancelRequest(
                generation_pb2.CancelRequestRequest(request_id=request_id), metadata=self._metadata
            )
        return response.request

    async def activities(self, count: int) -> generation_pb2.ListRequestsResponse:
        """Requests with their current activity: open requests, then the newest ended requests."""
        with self._translated():
            return await self._stub.ListRequests(
                generation_pb2.ListRequestsRequest(page_size=count, with_activity=True), metadata=self._metadata
            )

    async def models(self) -> list[generation_pb2.Model]:
        """The served models with their workers."""
        return list((await self.overview()).models)

    async def overview(self) -> generation_pb2.ListModelsResponse:
        """The served models with their workers, and the state of the store."""
        with self._translated():
            return await self._stub.ListModels(generation_pb2.ListModelsRequest(), metadata=self._metadata)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error)
            if isinstance(failure, Unavailable) and "andshake failed" in failure.message:
                raise Unavailable(
                    f"TLS handshake with {self._endpoint} failed (see --tls-ca): {failure.message}"
                ) from error
            if (
                isinstance(failure, Unavailable)
                and not is_sent_by_peer(error)
                and (proxy := proxy_variable(self._endpoint))
            ):
                raise Unavailable(
                    f"no fleet answers at {self._endpoint} through the proxy of {proxy}; no_proxy lists the "
                    f"hosts to connect to without a proxy: {failure.message}"
                ) from error
            if isinstance(failure, Unavailable) and "failed to connect" in failure.message:
                hint = "" if self._is_tls else "; if the fleet serves TLS, set --tls or --tls-ca"
                raise Unavailable(
                    f"no fleet answers at {self._endpoint}; `fleet up` starts one, --endpoint names another{hint}"
                ) from error
            raise failure from error


@contextlib.asynccontextmanager
async def connect(endpoint: str, access: Access = IN_THE_CLEAR) -> AsyncIterator[FleetClient]:
    """Create a client of the fleet at HOST:PORT or unix:PATH. Its first call connects."""
    channel = open_channel(endpoint, access.credentials, may_use_proxy=True)
    try:
        yield FleetClient(endpoint, channel, api_key=access.api_key, is_tls=access.credentials is not None)
    finally:
        await channel.close()


async def pause(failures: int) -> None:
    """Wait before a retry: 0.2 s, doubled for each consecutive failure."""
    await asyncio.sleep(0.2 * 2**failures)


async def retry_unavailable(attempt: Callable[[], Awaitable[T]], num_received: Callable[[], int]) -> T:
    """Run `attempt` until it returns, with exponential backoff after each Unavailable.

    `num_received` returns the number of messages received so far; a new message resets the backoff. Raises Unavailable
    at once if no message was ever received, else after RETRIES consecutive retries without a new message.
    """
    failures = 0
    while True:
        before = num_received()
        try:
            return await attempt()
        except Unavailable:
            received = num_received()
            failures = 0 if received > before else failures + 1
            if not received or failures > RETRIES:
                raise
        await pause(failures)


def state_name(state: generation_pb2.RequestState.ValueType) -> str:
    """The name of a state without its prefix, such as "RUNNING"."""
    return generation_pb2.RequestState.Name(state).removeprefix("REQUEST_STATE_")


def raise_unless_succeeded(request_id: str, change: generation_pb2.StateChange) -> None:
    """Raise RequestFailed for a terminal state without a result."""
    if change.state not in TERMINAL or change.state == generation_pb2.REQUEST_STATE_SUCCEEDED:
        return
    ending = {
        generation_pb2.REQUEST_STATE_CANCELLED: "was cancelled",
        generation_pb2.REQUEST_STATE_EXPIRED: "passed its deadline",
    }.get(change.state, "failed")
    why = f": {change.error.code}: {change.error.message}" if change.HasField("error") else ""
    raise RequestFailed(f"request {request_id} {ending}{why}", field=change.error.field)
