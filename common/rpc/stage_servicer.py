"""Serves consecutive stages through the RPC of their service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import Message

from common.codec import TensorLeaf, artifact_class, pack, unpack
from common.errors import (
    DeadlineExceeded,
    FleetError,
    InternalError,
    InvalidInput,
    ResourceExhausted,
    Unavailable,
)
from common.log_context import REQUEST_ID_KEY, enter_call, hide_texts
from common.rpc.buffers import BufferPool
from common.rpc.client import header_frame
from common.rpc.frame_reporter import FrameReporter
from common.rpc.frames import ChunkView, read_chunk
from common.rpc.framing import (
    Assembler,
    CallLimits,
    KeptFrames,
    Packet,
    PooledPayload,
    chunk_frames,
    described_tensors,
    split_packets,
)
from common.rpc.hand_over import RunningCall
from common.rpc.items import ItemAssembler
from common.rpc.method import (
    BEGUN_KEY,
    COMPUTED_KEY,
    ITEMS_KEY,
    VARIANT_KEY,
    begun_frame,
    check_contract,
    request_type,
    response_type,
    service_name,
    stage_method,
)
from common.rpc.parsing import parse, read_tokens, refuse_unknown_fields
from common.rpc.replies import Recorder, ReplyCache, Write
from common.rpc.stage_job import StageJob, do_nothing
from common.rpc.watchdog import Watchdog
from common.rpc.wrapping import Context, Handler
from common.stage import Call, Contract, item_kind
from common.streams import DeviceLock, StreamFeed
from common.telemetry import in_current_context
from common.trace_context import SpanKind, current_span
from common.tracing import span, start_span
from fleet.v1 import artifacts_pb2


class Stages(Protocol):
    """Interface of the served stages.

    Implemented by common.local.HostedStages and common.variants.HostedVariants.
    """

    contract: Contract

    def contract_of(self, variant: str) -> Contract:
        """Return the contract of a variant, of the first variant for "". Raises InvalidInput for an unknown name."""

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Compute output artifacts from input artifacts, by slot."""


@dataclass(frozen=True, kw_only=True)
class ServicerLimits:
    """Limits of a servicer.

    `capacity`: concurrent calls that receive inputs, wait for the device thread or run.
    `idle_seconds`: timeout for the next frame while the inputs or an item of a stream are incomplete.
    `step_seconds`: minimum interval of progress frames; the last step is always reported.
    `call`: limits of the tensors of one header or of one item of a stream.
    """

    capacity: int = 1
    idle_seconds: float = 30.0
    step_seconds: float = 0.0
    call: CallLimits = field(default_factory=CallLimits)


class StageServicer:
    """Implements the RPC of a stage service.

    Stages, unpacking and packing run on the single thread of `executor`. Calls with an input stream are sessions: each
    runs on a separate thread and releases the device while it waits for an input item or for the reader of its output,
    so that sessions alternate item by item. One thread at a time uses the device. With a `cache`, repeated inputs get
    the cached reply. With a `watchdog`, a stuck call ends as UNAVAILABLE, and so do new calls until the device thread
    is free. `model` is the model name in log lines. Raises PipelineError if the RPC's messages do not have all slots of
    the contract.
    """

    def __init__(
        self,
        service: str,
        stages: Stages,
        executor: ThreadPoolExecutor,
        leaf: TensorLeaf,
        *,
        limits: ServicerLimits | None = None,
        pool: BufferPool | None = None,
        cache: ReplyCache | None = None,
        watchdog: Watchdog | None = None,
        prepare_thread: Callable[[], None] = do_nothing,
        model: str = "",
    ) -> None:
        method = stage_method(service)
        check_contract(stages.contract, method)
        self.service_name = service_name(method)
        self._service = service
        self._model = model
        self._stages = stages
        self._executor = executor
        self._leaf = leaf
        self._limits = limits or ServicerLimits()
        self.pool = pool or BufferPool()
        self._cache = cache
        self._watchdog = watchdog
        self._device = DeviceLock()
        self._sessions: ThreadPoolExecutor | None = None
        if stages.contract.input_streams:
            count = self._limits.capacity
            self._sessions = ThreadPoolExecutor(count, thread_name_prefix="session", initializer=prepare_thread)
        self._request = request_type(method)
        self._reply = response_type(method)
        self._begun = begun_frame(self._reply)
        handler: Handler = grpc.stream_stream_rpc_method_handler(cast(Any, self._handle))
        self.methods: Mapping[str, Handler] = {method.name: handler}
        self.in_flight = 0
        self._jobs: list[StageJob] = []

    def close(self) -> None:
        """Stop the threads of sessions, and wait for running computations."""
        if self._sessions is not None:
            self._sessions.shutdown(cancel_futures=True)

    def running(self) -> Sequence[RunningCall]:
        """Return the calls that have not ended, in order of arrival."""
        return tuple(self._jobs)

    async def _handle(self, _requests: object, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        enter_call(metadata, model=self._model, stage=self._service)
        with self._occupied() as leave, span(f"serve {self._service}", SpanKind.SERVER, service=self._service):
            begun = self._begun if metadata.get(BEGUN_KEY) == "1" else None
            reads_items = metadata.get(ITEMS_KEY) == "1"
            job = StageJob(self.pool.lease(), _call_of(context, metadata), begun, reads_items=reads_items)
            job.call = replace(job.call, waiting=partial(self._waiting, job))
            self._jobs.append(job)
            feeding: asyncio.Task[None] | None = None
            try:
                contract = self._stages.contract_of(job.call.variant)
                if contract.output_streams and not reads_items:
                    raise InvalidInput(
                        f"{contract.name} of this model returns streams; send the metadata {ITEMS_KEY}: 1"
                    )
                with span("receive inputs") as receiving:
                    await self._receive(context, job, contract)
                    receiving.set(bytes=sum(packet.byte_size for packet in job.inputs.values()))
                hide_texts(_prompts(job.inputs))
                if contract.input_streams:
                    feeding = asyncio.create_task(self._feed(context, job, contract))
                if self._cache is None:
                    await self._compute_and_answer(context.write, job, leave)
                else:
                    await self._answer_through(self._cache, context.write, job, leave)
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.wait({feeding})
                if job.seconds:
                    context.set_trailing_metadata(((COMPUTED_KEY, f"{job.seconds:.6f}"),))
                self._jobs.remove(job)
                job.abandon()

    async def _compute_and_answer(self, write: Write, job: StageJob, leave: Callable[[], None]) -> None:
        outputs = await self._run(write, job)
        await self._answer(write, outputs, leave)

    async def _answer_through(self, cache: ReplyCache, write: Write, job: StageJob, leave: Callable[[], None]) -> None:
        key = cache.key(job.inputs, job.call.variant)
        if (cached := await cache.find(key)) is not None:
            current_span().set(cached=True)
            for frame in cached[:-1]:
                await write(frame)
            leave()
            await write(cached[-1])
            return
        recorder = Recorder(write, cache.max_bytes, uncached=job.begun)
        await self._compute_and_answer(recorder.write, job, leave)
        if recorder.frames:
            cache.add(key, recorder.frames, job.seconds)

    @contextmanager
    def _occupied(self) -> Iterator[Callable[[], None]]:
        """Occupy one unit of the capacity, and yield a function that releases it before the end of the block.

        A cancelled call releases its unit immediately, although its stage may compute for the rest of a step, so that
        the next call can receive its inputs in that time.

        Raises Unavailable while the device is stuck, and ResourceExhausted at full capacity.
        """
        if self._watchdog is not None and self._watchdog.is_stuck:
            raise Unavailable("this worker's device is stuck in an earlier call; retry on another worker")
        if self.in_flight >= self._limits.capacity:
            raise ResourceExhausted(f"this worker runs its maximum of {self._limits.capacity} concurrent calls")
        self.in_flight += 1
        held = [True]

        def leave() -> None:
            if held:
                held.clear()
                self.in_flight -= 1

        try:
            yield leave
        finally:
            leave()

    async def _receive(self, context: Context, job: StageJob, contract: Contract) -> None:
        """Read the header and its chunks.

        Ends at half-close or, with an input stream, once the chunks are complete.
        """
        assembler: Assembler | None = None
        header: Message | None = None
        while not (contract.input_streams and assembler is not None and assembler.complete):
            if (raw := await self._read(context)) is None:
                break
            chunk, frame = self._parsed(raw)
            if chunk is not None:
                if assembler is None:
                    raise InvalidInput(f"{chunk.path!r}: a chunk was sent before the header", field=chunk.path)
                assembler.add(chunk)
            elif header is not None:
                raise InvalidInput("the call has a second header")
            else:
                header = self._checked_header(frame, contract)
                tensors = described_tensors("", header, self._limits.call)
                assembler = Assembler(tensors, partial(PooledPayload, lease=job.lease))
        if header is None or assembler is None:
            raise InvalidInput("the call ended before its header")
        job.inputs = split_packets(header, assembler.finish())
        for slot in contract.input_streams:
            kind = artifact_class(cast(str, item_kind(contract.inputs[slot])))
            job.feeds[slot] = StreamFeed(job.call, partial(self._unpack_item, slot, kind))

    def _unpack_item(self, slot: str, kind: type[Any], packet: Packet) -> Any:
        return unpack(slot, kind, packet, self._leaf)

    def _parsed(self, raw: bytes) -> tuple[ChunkView | None, Any]:
        """Return the chunk of a frame and None, or None and the parsed frame."""
        chunk = read_chunk(raw)
        if chunk is not None:
            return chunk, None
        frame: Any = parse(self._request, raw)
        if frame.WhichOneof("frame") == "chunk":
            return ChunkView(frame.chunk.path, frame.chunk.offset, frame.chunk.data), None
        return None, frame

    async def _feed(self, context: Context, job: StageJob, contract: Contract) -> None:
        """Read the items of the call's input stream until half-close. Waits while the stage's feed is full."""
        ((slot, feed),) = job.feeds.items()
        kinds = {slot: cast(str, item_kind(contract.inputs[slot]))}
        items = ItemAssembler(kinds, self._limits.call, lambda _: KeptFrames)
        count = 0
        try:
            while (raw := await self._read(context, waits=not items.is_within_item)) is not None:
                chunk, frame = self._parsed(raw)
                if chunk is not None and not items.takes(chunk):
                    raise InvalidInput(
                        f"{chunk.path!r}: a chunk was sent for a tensor that no item describes", field=chunk.path
                    )
                if chunk is None and frame.WhichOneof("frame") != "item":
                    raise InvalidInput("a frame after the header is neither item nor chunk")
                item = items.begin(frame.item) if chunk is None else items.add(chunk)
                if item is not None:
                    if item.index != count:
                        raise InvalidInput(
                            f"{slot}: item {item.index} was received instead of item {count}", field=slot
                        )
                    count += 1
                    await feed.put(item.packet, item.packet.byte_size)
            if items.is_within_item:
                raise InvalidInput(f"{slot}: the call ended within item {count}", field=slot)
        except FleetError as error:
            feed.close(error)
        else:
            feed.close()

    async def _read(self, context: Context, *, waits: bool = False) -> bytes | None:
        """Return the next frame; None after the last.

        Raises DeadlineExceeded after `idle_seconds` without a frame, unless `waits`: the caller may be waiting for
        another worker.
        """
        try:
            async with asyncio.timeout(None if waits else self._limits.idle_seconds):
                raw = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no frame was received for {self._limits.idle_seconds:g} s") from None
        return None if raw is grpc.aio.EOF else cast(bytes, raw)

    def _checked_header(self, frame: Any, contract: Contract) -> Message:
        refuse_unknown_fields("", frame)
        if not frame.HasField("header"):
            raise InvalidInput("the first frame is neither header nor chunk")
        header: Message = frame.header
        present = {descriptor.name for descriptor, _ in header.ListFields()}
        for slot in sorted(present - contract.inputs.keys()):
            raise InvalidInput(
                f"{slot}: an artifact was sent, but {contract.name} of this model does not read this slot", field=slot
            )
        for slot in sorted(present & contract.input_streams):
            raise InvalidInput(f"{slot} is a stream; send its items after the header", field=slot)
        for slot in contract.inputs:
            if slot not in present and slot not in contract.optional and slot not in contract.input_streams:
                raise InvalidInput(f"{slot} is missing; {contract.name} of this model requires it", field=slot)
        return header

    async def _run(self, write: Write, job: StageJob) -> Mapping[str, Packet]:
        """Run the stages on the device thread, and send their reports meanwhile. Returns the outputs."""
        reporter = FrameReporter(
            self._reply,
            self._leaf,
            step_seconds=self._limits.step_seconds,
            begun=job.begun,
            sends_items=job.reads_items,
        )
        executor = self._sessions if job.feeds and self._sessions is not None else self._executor
        job.waiting = start_span("wait for device")
        work = in_current_context(partial(self._compute, job, reporter))
        job.start(executor, work, reporter.end)
        try:
            async for frame in reporter.frames():
                await write(frame)
        finally:
            reporter.release()
        return job.result()

    def _compute(self, job: StageJob, reporter: FrameReporter) -> dict[str, Packet]:
        """Unpack the inputs, run the stages and pack the outputs, on the device thread."""
        with self._device:
            call = job.timed(reporter.listen(job.call))
            call.check_cancelled()
            job.begin()
            job.waiting.end()
            reporter.begin()
            began = time.perf_counter()
            try:
                return self._outputs(job, call)
            finally:
                # Includes packing, because copying outputs to the CPU waits for the device.
                job.seconds = time.perf_counter() - began - job.waited_seconds

    @contextmanager
    def _waiting(self, job: StageJob) -> Iterator[None]:
        """Release the device and pause the watchdog while a stage's thread waits for other workers."""
        began = time.perf_counter()
        try:
            with nullcontext() if self._watchdog is None else self._watchdog.paused(), self._device.released():
                yield
        finally:
            job.waited_seconds += time.perf_counter() - began

    def _outputs(self, job: StageJob, call: Call) -> dict[str, Packet]:
        """Run the stages and return their outputs as packets."""
        contract = self._stages.contract_of(call.variant)
        # pop() releases the packets, so that only tensors reference the receive buffers.
        values = {
            slot: unpack(slot, artifact_class(contract.inputs[slot]), job.inputs.pop(slot), self._leaf)
            for slot in list(job.inputs)
        }
        with nullcontext(call) if self._watchdog is None else self._watchdog.watch(call, job.fail) as watched:
            outputs = self._stages.run({**values, **job.feeds}, watched)
        try:
            return {slot: pack(slot, artifact, self._leaf) for slot, artifact in outputs.items()}
        except InvalidInput as error:
            raise InternalError(f"{contract.name} returned an output that cannot be encoded: {error}") from error

    async def _answer(self, write: Write, outputs: Mapping[str, Packet], leave: Callable[[], None]) -> None:
        """Send the outputs. Releases capacity before the last frame, so that the caller can start its next call."""
        with span("send outputs", bytes=sum(packet.byte_size for packet in outputs.values())):
            frame = header_frame(self._reply, outputs)
            for packet in outputs.values():
                for following in chunk_frames(packet.chunks):
                    await write(frame)
                    frame = following
            leave()
            await write(frame)


def _prompts(inputs: Mapping[str, Packet]) -> Iterator[str]:
    """Yield the prompts in the inputs of a call."""
    for packet in inputs.values():
        if isinstance(packet.message, artifacts_pb2.Prompt):
            yield from (value for _, value in packet.message.ListFields() if isinstance(value, str))


def _call_of(context: Context, metadata: Mapping[str, str | bytes]) -> Call:
    remaining = context.time_remaining()
    return Call(
        str(metadata.get(REQUEST_ID_KEY, "")),
        deadline=None if remaining is None else time.monotonic() + remaining,
        variant=str(metadata.get(VARIANT_KEY, "")),
        tokens=read_tokens(metadata),
    )
