"""Runs stages that are served elsewhere. Values are packets: tensors pass through unopened."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from common.errors import DeadlineExceeded, HandedOver, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.rpc.address import is_local, target_of
from common.rpc.frames import ChunkView, read_chunk
from common.rpc.framing import (
    Assembler,
    CallLimits,
    Dropped,
    KeptFrames,
    Packet,
    chunk_frames,
    described_tensors,
    split_packets,
)
from common.rpc.method import (
    BEGUN_KEY,
    COMPUTED_KEY,
    STEP_CHECKPOINT,
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
from common.stage import Call, Contract
from common.telemetry import REQUEST_ID_KEY
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import worker_pb2, worker_pb2_grpc

_HOP_SECONDS = 0.005  # what a hop keeps of the deadline for itself


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    server_name: str = "",
    may_use_proxy: bool = False,
) -> grpc.aio.Channel:
    """A channel to a gRPC target: host:port, or unix:path. It connects at the first call.

    With credentials it speaks TLS, and the server's certificate must be for `server_name`, or else for the host. With
    `may_use_proxy` an address of another host is reached as gRPC's proxy variables say, such as https_proxy.
    """
    target = target_of(address)
    options = CHANNEL_OPTIONS if may_use_proxy and not is_local(address) else (*CHANNEL_OPTIONS, *NO_PROXY)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return grpc.aio.secure_channel(target, credentials, options=(*options, *named))


async def get_model_info(channel: grpc.aio.Channel, *, seconds: float = 10) -> worker_pb2.WorkerInfo:
    """What the worker at the other end says about itself. Raises FleetError."""
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    try:
        reply = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=seconds)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return reply.worker


class WorkerLost(Unavailable):
    """The connection ended after the call's first frame was sent: the call may have begun."""


class RemoteRunner:
    """Runs a contract on the worker behind a channel. The twin of common.local.LocalRunner.

    Cancelling the task that awaits it cancels the call. All that the worker reports goes to the Call: checkpoints as
    packets for the slot CHECKPOINT, and `on_begun` when the worker starts the call's stages, which workers older than
    Begun frames do not report (see `reports_begun` of WorkerInfo). Raises the error that the worker raised, and
    Unavailable when the connection is lost (WorkerLost during the call), so that the caller can try another worker with
    the same packets. ResourceExhausted has a field where no worker could take the values, and none where this worker
    has as many calls as it takes.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        service: str,
        contract: Contract,
        *,
        limits: CallLimits | None = None,
    ) -> None:
        method = stage_method(service)
        check_contract(contract, method)
        self._contract = contract
        self._service = service
        self._limits = limits or CallLimits()
        self._request = request_type(method)
        self._reply = response_type(method)
        self._open: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path_of(method))

    @property
    def contract(self) -> Contract:
        """What the stages read and write together."""
        return self._contract

    async def __call__(self, values: Mapping[str, Packet], call: Call) -> Mapping[str, Packet]:
        """Send the inputs, report what the worker reports, return the outputs."""
        call.check_cancelled()
        timeout = call.seconds_left()
        if timeout is not None and (timeout := timeout - _HOP_SECONDS) <= 0:
            raise DeadlineExceeded(f"request {call.request_id} cannot reach {self._service} before its deadline")
        header = header_frame(self._request, values)
        if len(header) > MAX_MESSAGE_BYTES:
            largest = max(values, key=lambda slot: values[slot].message.ByteSize())
            raise ResourceExhausted(
                f"{largest} makes a header of {len(header)} bytes; at most {MAX_MESSAGE_BYTES} travel", field=largest
            )
        sent = asyncio.Event()
        variant = ((VARIANT_KEY, call.variant),) if call.variant else ()
        rpc = self._open(
            _request_frames(header, values.values(), sent),
            timeout=timeout,
            metadata=((REQUEST_ID_KEY, call.request_id), (BEGUN_KEY, "1"), *variant),
        )
        receiver = _Receiver(self._reply, self._contract, call, self._limits)
        try:
            async for raw in rpc:
                receiver.take(raw)
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
            raise InternalError(f"{self._service} answered with wrong frames: {error}") from error
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            raise Unavailable(f"the channel to {self._service} was closed during the call") from None
        finally:
            rpc.cancel()  # Without effect on a call that has ended.


def _report_computed(trailing: Iterable[tuple[str, str | bytes]] | None, call: Call) -> None:
    """Report the worker's compute seconds; a worker that answered from its cache, or an older one, sends none."""
    for key, value in trailing or ():
        if key == COMPUTED_KEY:
            try:
                seconds = float(value)
            except ValueError:
                raise InternalError(f"{COMPUTED_KEY}: {value!r} is not a number of seconds") from None
            if math.isfinite(seconds) and seconds >= 0:
                call.on_computed(seconds)


async def _request_frames(header: bytes, packets: Iterable[Packet], sent: asyncio.Event) -> AsyncIterator[bytes]:
    """The frames of a call; `sent` is set once the first one is on its way, so that there is a connection."""
    yield header
    sent.set()
    for packet in packets:
        for chunk in chunk_frames(packet.chunks):
            yield chunk


def header_frame(frame: type[Message], values: Mapping[str, Packet]) -> bytes:
    """The serialised frame of a header with these artifacts."""
    header: Any = header_type(frame)()
    for slot, packet in values.items():
        field_of_slot = getattr(header, slot)
        field_of_slot.SetInParent()
        field_of_slot.CopyFrom(packet.message)
    message: Any = frame()
    message.header.SetInParent()
    message.header.CopyFrom(header)
    return cast(bytes, message.SerializeToString())


@dataclass
class _Receiver:
    """Takes the frames of a reply in the order they come."""

    frame: type[Message]
    contract: Contract
    call: Call
    limits: CallLimits
    header: Message | None = None
    chunks: Assembler | None = None
    state: pb.DenoiseState | None = None
    state_chunks: Assembler | None = None

    def take(self, raw: bytes) -> None:
        chunk = read_chunk(raw)
        if chunk is not None:
            self._take_chunk(chunk)
            return
        frame: Any = self.frame.FromString(raw)
        match frame.WhichOneof("frame"):
            case "chunk":
                self._take_chunk(ChunkView(frame.chunk.path, frame.chunk.offset, frame.chunk.data))
            case "progress":
                self.call.on_progress(frame.progress.step, frame.progress.total_steps)
            case "begun":
                self.call.on_begun()
            case "warning":
                self.call.on_warning(frame.warning.field, frame.warning.message)
            case "checkpoint":
                self._begin_checkpoint(frame.checkpoint.state)
            case "header" if self.header is None:
                self._begin_outputs(frame.header)
            case other:
                raise InternalError(f"an unexpected frame: {other or 'of a kind that this version does not know'}")

    def _begin_outputs(self, header: Message) -> None:
        present = {descriptor.name for descriptor, _ in header.ListFields()}
        if present != self.contract.outputs.keys():
            raise InternalError(f"outputs {sorted(present)} instead of {sorted(self.contract.outputs)}")
        self.header = header
        self.chunks = Assembler(described_tensors("", header, self.limits), KeptFrames)

    def _begin_checkpoint(self, state: pb.DenoiseState) -> None:
        if self.state_chunks is not None:
            raise InternalError("a checkpoint begins before the one before it is complete")
        self.state = state
        tensors = described_tensors(STEP_CHECKPOINT, state, self.limits)
        self.state_chunks = Assembler(tensors, KeptFrames if self.call.keeps_step_checkpoints else Dropped)
        self._end_checkpoint()

    def _take_chunk(self, chunk: ChunkView) -> None:
        if self.state_chunks is not None and chunk.path.startswith(f"{STEP_CHECKPOINT}."):
            self.state_chunks.add(chunk)
            self._end_checkpoint()
        elif self.chunks is not None:
            self.chunks.add(chunk)
        else:
            raise InternalError(f"a chunk of {chunk.path!r} before its header")

    def _end_checkpoint(self) -> None:
        if self.state is None or self.state_chunks is None or not self.state_chunks.complete:
            return
        if self.call.keeps_step_checkpoints:
            self.call.on_step_checkpoint(Packet(self.state, self.state_chunks.finish()))
        self.state = self.state_chunks = None

    def finish(self) -> dict[str, Packet]:
        if self.header is None or self.chunks is None or self.state_chunks is not None:
            raise Unavailable("the call ended without its result")
        return split_packets(self.header, self.chunks.finish())


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
