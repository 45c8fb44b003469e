"""Runs stages on remote workers. Values are packets, whose tensors are not decoded."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from common.errors import DeadlineExceeded, HandedOver, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.log_context import REQUEST_ID_KEY, outgoing_attempt
from common.rpc.address import is_local, target_of
from common.rpc.call_metrics import ClientAttempt, counted_stream
from common.rpc.frames import ChunkView, read_chunk
from common.rpc.framing import (
    Assembler,
    CallLimits,
    Dropped,
    KeptFrames,
    Packet,
    StoreFactory,
    chunk_frames,
    described_tensors,
    split_packets,
)
from common.rpc.items import ItemAssembler, ReceivedItem, item_frames
from common.rpc.method import (
    BEGUN_KEY,
    COMPUTED_KEY,
    ITEMS_KEY,
    TOKENS_KEY,
    VARIANT_KEY,
    check_contract,
    header_type,
    path_of,
    request_type,
    response_type,
    stage_method,
)
from common.rpc.options import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, NO_PROXY
from common.rpc.status import from_rpc_error, is_sent_by_peer
from common.stage import STEP_CHECKPOINTS, Call, Contract, item_kind
from common.streams import ItemBuffer
from common.trace_context import NO_SPAN, outgoing
from common.tracing import start_span
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import worker_pb2, worker_pb2_grpc

_HOP_SECONDS = 0.005  # subtracted from the deadline of each call, for the transport of its reply


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    server_name: str = "",
    may_use_proxy: bool = False,
) -> grpc.aio.Channel:
    """Return a channel to host:port or unix:path. It connects at the first call.

    With `credentials`, the channel uses TLS, and the server's certificate must be valid for `server_name` (default: the
    host). With `may_use_proxy`, gRPC's proxy variables, such as https_proxy, apply to other hosts.
    """
    target = target_of(address)
    options = CHANNEL_OPTIONS if may_use_proxy and not is_local(address) else (*CHANNEL_OPTIONS, *NO_PROXY)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return grpc.aio.secure_channel(target, credentials, options=(*options, *named))


async def get_model_info(channel: grpc.aio.Channel, *, seconds: float = 10) -> worker_pb2.WorkerInfo:
    """Return the metadata of the worker behind a channel. Raises FleetError."""
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    try:
        reply = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return reply.worker


class WorkerLost(Unavailable):
    """The connection was lost after the call's first frame was sent: its stages may have started."""


class RemoteRunner:
    """Runs a contract on the worker behind a channel. Values are packets; LocalRunner's values are artifacts.

    The value of a stream is an ItemBuffer of packets, which is read from the first item. Cancelling the task cancels
    the call. The worker's progress, warnings and compute seconds are passed to the callbacks of the Call; stream items
    and step checkpoints are put into `sinks`, as packets. `on_begun` is called when the stages start, if
    WorkerInfo.reports_begun is set.

    Raises the error of the worker. Raises Unavailable if the connection is lost (WorkerLost after the first frame), so
    that the caller can retry with the same packets on another worker. ResourceExhausted has a field if the values are
    too large for every worker, and no field if this worker is at capacity. `unread` are outputs beyond the contract
    that a worker of another release may return, including streams; they are dropped.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        service: str,
        contract: Contract,
        *,
        limits: CallLimits | None = None,
        unread: Collection[str] = (),
    ) -> None:
        method = stage_method(service)
        check_contract(contract, method)
        self._contract = contract
        self._service = service
        self._limits = limits or CallLimits()
        self._unread = frozenset(unread)
        self._request = request_type(method)
        self._reply = response_type(method)
        self._path = path_of(method)
        self._open = counted_stream(channel, self._path)

    @property
    def contract(self) -> Contract:
        """Contract of all stages together."""
        return self._contract

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Packet]:
        """Send the inputs, forward the worker's reports to `call`, and return the outputs, except streams."""
        call.check_cancelled()
        timeout = call.seconds_left()
        if timeout is not None and (timeout := timeout - _HOP_SECONDS) <= 0:
            raise DeadlineExceeded(f"request {call.request_id} cannot reach {self._service} before its deadline")
        packets = {slot: value for slot, value in values.items() if isinstance(value, Packet)}
        header = header_frame(self._request, packets)
        if len(header) > MAX_MESSAGE_BYTES:
            largest = max(packets, key=lambda slot: packets[slot].message.ByteSize())
            raise ResourceExhausted(
                f"{largest}: a header of {len(header)} bytes is not at most {MAX_MESSAGE_BYTES} bytes", field=largest
            )
        sent = asyncio.Event()
        variant = ((VARIANT_KEY, call.variant),) if call.variant else ()
        tokens = ((TOKENS_KEY, str(call.tokens)),) if call.tokens else ()
        attempt = ClientAttempt(self._path.lstrip("/"))
        rpc = self._open(
            self._request_frames(header, values, sent),
            timeout=timeout,
            metadata=(
                (REQUEST_ID_KEY, call.request_id),
                (BEGUN_KEY, "1"),
                (ITEMS_KEY, "1"),
                *variant,
                *tokens,
                *outgoing_attempt(),
                *outgoing(),
            ),
        )
        receiver = _Receiver(self._reply, self._contract, self._unread, call, self._limits)
        try:
            async for raw in rpc:
                if (item := receiver.take(raw)) is not None and item.slot in call.sinks:
                    await call.sinks[item.slot].put(item.index, item.packet, item.packet.byte_size)
            outputs = receiver.finish()
            _report_computed(await rpc.trailing_metadata(), call)
            return outputs
        except grpc.aio.AioRpcError as error:
            reason = from_rpc_error(error)
            if isinstance(reason, HandedOver):
                _report_computed(error.trailing_metadata(), call)
            if isinstance(reason, Unavailable) and sent.is_set() and not is_sent_by_peer(error):
                reason = WorkerLost(reason.message)
            raise reason from error
        except (InvalidInput, DecodeError) as error:
            raise InternalError(f"{self._service} returned invalid frames: {error}") from error
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            raise Unavailable(f"the channel to {self._service} was closed during the call") from None
        finally:
            receiver.span.end()
            rpc.cancel()  # No effect on a call that has ended.
            attempt.end(await rpc.code())

    async def _request_frames(
        self, header: bytes, values: Mapping[str, Any], sent: asyncio.Event
    ) -> AsyncIterator[bytes]:
        """Yield the frames of a call. Sets `sent` after the first frame, when the connection is established."""
        packets = [value for value in values.values() if isinstance(value, Packet)]
        sending = start_span("send inputs", bytes=sum(packet.byte_size for packet in packets))
        try:
            yield header
            sent.set()
            for packet in packets:
                for chunk in chunk_frames(packet.chunks):
                    yield chunk
        finally:
            sending.end()
        for slot, value in values.items():
            if isinstance(value, ItemBuffer):
                index = 0
                async for item, _ in value.read():
                    for frame in item_frames(self._request, slot, index, item):
                        yield frame
                    index += 1


def _report_computed(trailing: Iterable[tuple[str, str | bytes]] | None, call: Call) -> None:
    """Report the worker's compute seconds to `call`. Cached replies and workers of earlier releases have none."""
    for key, value in trailing or ():
        if key == COMPUTED_KEY:
            try:
                seconds = float(value)
            except ValueError:
                raise InternalError(f"{COMPUTED_KEY}: {value!r} is not a number of seconds") from None
            if math.isfinite(seconds) and seconds >= 0:
                call.on_computed(seconds)


def header_frame(frame: type[Message], values: Mapping[str, Packet]) -> bytes:
    """Return the serialized frame of a header with these artifacts."""
    header: Any = header_type(frame)()
    for slot, packet in values.items():
        field_of_slot = getattr(header, slot)
        field_of_slot.SetInParent()
        field_of_slot.CopyFrom(packet.message)
    message: Any = frame()
    message.header.SetInParent()
    message.header.CopyFrom(header)
    return cast(bytes, message.SerializeToString())


class _Receiver:
    """Receives the frames of a reply, in order."""

    def __init__(
        self, frame: type[Message], contract: Contract, unread: frozenset[str], call: Call, limits: CallLimits
    ) -> None:
        self._frame = frame
        self._unread = unread
        self._outputs = contract.outputs.keys() - contract.output_streams
        self._call = call
        self._limits = limits
        self._header: Message | None = None
        self._chunks: Assembler | None = None
        self.span = NO_SPAN
        kinds = {slot: kind for slot, of in contract.outputs.items() if (kind := item_kind(of)) is not None}
        self._items = ItemAssembler({**kinds, STEP_CHECKPOINTS: "DenoiseState"}, limits, self._store_of)

    def _store_of(self, slot: str) -> StoreFactory:
        """Return the Store class for payloads of a stream's items. Payloads of streams without a sink are dropped."""
        return KeptFrames if slot in self._call.sinks else Dropped

    def take(self, raw: bytes) -> ReceivedItem | None:
        """Process a frame. Returns the item that it completes, or None."""
        chunk = read_chunk(raw)
        if chunk is not None:
            return self._take_chunk(chunk)
        frame: Any = self._frame.FromString(raw)
        match frame.WhichOneof("frame"):
            case "chunk":
                return self._take_chunk(ChunkView(frame.chunk.path, frame.chunk.offset, frame.chunk.data))
            case "progress":
                self._call.on_progress(frame.progress.step, frame.progress.total_steps)
            case "begun":
                self._call.on_begun()
            case "warning":
                self._call.on_warning(frame.warning.field, frame.warning.message)
            case "item":
                return None if frame.item.slot in self._unread else self._items.begin(frame.item)
            case "checkpoint":  # sent by workers without StreamItem frames
                state = frame.checkpoint.state
                return self._items.begin(pb.StreamItem(slot=STEP_CHECKPOINTS, index=state.step, denoise_state=state))
            case "header" if self._header is None:
                self._begin_outputs(frame.header)
            case other:
                raise InternalError(
                    f"the reply has an unexpected frame: {other or 'of a kind that this release does not support'}"
                )
        return None

    def _begin_outputs(self, header: Message) -> None:
        present = {descriptor.name for descriptor, _ in header.ListFields()}
        for slot in present & self._unread:
            header.ClearField(slot)
        if present - self._unread != self._outputs:
            raise InternalError(f"outputs: {sorted(present)} are not {sorted(self._outputs)}, the outputs of the call")
        self._header = header
        self.span = start_span("receive outputs")
        self._chunks = Assembler(described_tensors("", header, self._limits), KeptFrames)

    def _take_chunk(self, chunk: ChunkView) -> ReceivedItem | None:
        if self._items.takes(chunk):
            return self._items.add(chunk)
        if chunk.path.partition(".")[0] in self._unread:
            return None
        if self._chunks is None:
            raise InternalError(f"a chunk of {chunk.path!r} was received before its header")
        self._chunks.add(chunk)
        return None

    def finish(self) -> dict[str, Packet]:
        """Return the outputs after the end of the call.

        Raises Unavailable if the header or the rest of an item is missing, and InvalidInput for an incomplete payload.
        """
        if self._header is None or self._chunks is None or self._items.is_within_item:
            raise Unavailable("the call ended without its result")
        packets = split_packets(self._header, self._chunks.finish())
        self.span.set(bytes=sum(packet.byte_size for packet in packets.values()))
        self.span.end()
        return packets


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
