"""Serves a run of stages behind its service's RPC."""

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
    """What is served; common.local.HostedStages is one."""

    contract: Contract

    def contract_of(self, variant: str) -> Contract:
        """What the stages of a variant read and write; empty means the first. Raises InvalidInput for another name."""

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Artifacts in, artifacts out, by slot."""


@dataclass(frozen=True, kw_only=True)
class ServicerLimits:
    """Bounds of a servicer.

    `capacity` calls run or wait for the device thread at a time; a peer that sends no frame for `idle_seconds` before
    its inputs are complete, or within an item of a stream, is given up. Steps are told at most every `step_seconds`,
    and the last one always.
    """

    capacity: int = 1
    idle_seconds: float = 30.0
    step_seconds: float = 0.0
    call: CallLimits = field(default_factory=CallLimits)


class StageServicer:
    """Puts stages behind the RPC of a service.

    Raises PipelineError when the stages' contract is not part of the RPC's messages. The stages run on `executor`,
    which has the one thread that may touch the device; unpacking and packing run there too, off the event loop. Calls
    that read a stream are sessions: each runs on a thread of its own, and has the device while it does not wait for an
    item or for its reader, so that sessions alternate item by item. With a cache, a call whose inputs came before is
    answered from it. With a watchdog, a call that is stuck is answered with UNAVAILABLE, and so is each new one until
    the device thread is free. `model` is the model's name in log lines.
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
        """End the threads of sessions; waits for those that still compute."""
        if self._sessions is not None:
            self._sessions.shutdown(cancel_futures=True)

    def running(self) -> Sequence[RunningCall]:
        """The calls that have not ended, in the order in which they came."""
        return tuple(self._jobs)

    async def _handle(self, _requests: object, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        enter_call(metadata, model=self._model, stage=self._service)
        with self._place() as leave, span(f"serve {self._service}", SpanKind.SERVER, service=self._service):
            begun = self._begun if metadata.get(BEGUN_KEY) == "1" else None
            reads_items = metadata.get(ITEMS_KEY) == "1"
            job = StageJob(self.pool.lease(), _call_of(context, metadata), begun, reads_items=reads_items)
            job.call = replace(job.call, waiting=partial(self._waiting, job))
            self._jobs.append(job)
            feeding: asyncio.Task[None] | None = None
            try:
                contract = self._stages.contract_of(job.call.variant)
                if contract.output_streams and not reads_items:
                    raise InvalidInput(f"{contract.name} of this model answers with streams: send {ITEMS_KEY}: 1")
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
        if (kept := await cache.find(key)) is not None:
            current_span().set(cached=True)
            for frame in kept[:-1]:
                await write(frame)
            leave()
            await write(kept[-1])
            return
        recorder = Recorder(write, cache.max_bytes, uncached=job.begun)
        await self._compute_and_answer(recorder.write, job, leave)
        if recorder.frames:
            cache.add(key, recorder.frames, job.seconds)

    @contextmanager
    def _place(self) -> Iterator[Callable[[], None]]:
        """One of the servicer's places, and the function that gives it back early.

        A cancelled call gives its place back at once, although its stage may compute for the rest of a step: the
        next call's inputs arrive meanwhile, and wait for the device thread.
        """
        if self._watchdog is not None and self._watchdog.is_stuck:
            raise Unavailable("this worker's device is stuck in the call before; another worker can take this one")
        if self.in_flight >= self._limits.capacity:
            raise ResourceExhausted(f"this worker takes {self._limits.capacity} calls at a time and has as many")
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
        """Read the header and the chunks that it announces, until half-close, or until the items of a stream."""
        assembler: Assembler | None = None
        header: Message | None = None
        while not (contract.input_streams and assembler is not None and assembler.complete):
            if (raw := await self._read(context)) is None:
                break
            chunk, frame = self._parsed(raw)
            if chunk is not None:
                if assembler is None:
                    raise InvalidInput(f"a chunk of {chunk.path!r} before the header", field=chunk.path)
                assembler.add(chunk)
            elif header is not None:
                raise InvalidInput("a second header")
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
        """The chunk in a frame, or else the frame."""
        chunk = read_chunk(raw)
        if chunk is not None:
            return chunk, None
        frame: Any = parse(self._request, raw)
        if frame.WhichOneof("frame") == "chunk":
            return ChunkView(frame.chunk.path, frame.chunk.offset, frame.chunk.data), None
        return None, frame

    async def _feed(self, context: Context, job: StageJob, contract: Contract) -> None:
        """Read the items of the call's stream until half-close, and no more of them than its stage has room for."""
        ((slot, feed),) = job.feeds.items()
        kinds = {slot: cast(str, item_kind(contract.inputs[slot]))}
        items = ItemAssembler(kinds, self._limits.call, lambda _: KeptFrames)
        count = 0
        try:
            while (raw := await self._read(context, waits=not items.is_within_item)) is not None:
                chunk, frame = self._parsed(raw)
                if chunk is not None and not items.takes(chunk):
                    raise InvalidInput(f"a chunk of {chunk.path!r}, which no item announces", field=chunk.path)
                if chunk is None and frame.WhichOneof("frame") != "item":
                    raise InvalidInput("a frame that is neither item nor chunk after the header")
                item = items.begin(frame.item) if chunk is None else items.add(chunk)
                if item is not None:
                    if item.index != count:
                        raise InvalidInput(f"item {item.index} of {slot} came where {count} is next", field=slot)
                    count += 1
                    await feed.put(item.packet, item.packet.byte_size)
            if items.is_within_item:
                raise InvalidInput(f"the call ended within item {count} of {slot}", field=slot)
        except FleetError as error:
            feed.close(error)
        else:
            feed.close()

    async def _read(self, context: Context, *, waits: bool = False) -> bytes | None:
        """The next frame, None after the last.

        Raises DeadlineExceeded when the peer falls silent, unless it `waits` for what another worker makes.
        """
        try:
            async with asyncio.timeout(None if waits else self._limits.idle_seconds):
                raw = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(f"no frame came for {self._limits.idle_seconds:g} s") from None
        return None if raw is grpc.aio.EOF else cast(bytes, raw)

    def _checked_header(self, frame: Any, contract: Contract) -> Message:
        refuse_unknown_fields("", frame)
        if not frame.HasField("header"):
            raise InvalidInput("a frame that is neither header nor chunk")
        header: Message = frame.header
        present = {descriptor.name for descriptor, _ in header.ListFields()}
        for slot in sorted(present - contract.inputs.keys()):
            raise InvalidInput(f"{slot} is present, but {contract.name} of this model does not read it", field=slot)
        for slot in sorted(present & contract.input_streams):
            raise InvalidInput(f"{slot} is a stream: its items come after the header", field=slot)
        for slot in contract.inputs:
            if slot not in present and slot not in contract.optional and slot not in contract.input_streams:
                raise InvalidInput(f"{slot} is missing; {contract.name} of this model needs it", field=slot)
        return header

    async def _run(self, write: Write, job: StageJob) -> Mapping[str, Packet]:
        """Compute on the device thread; meanwhile send on what the stages report."""
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
        """Unpack, run, pack: on the device thread. Empties inputs, so that nothing but tensors holds on to buffers."""
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
                job.seconds = time.perf_counter() - began - job.waited_seconds  # packing waits for the device

    @contextmanager
    def _waiting(self, job: StageJob) -> Iterator[None]:
        """The context in which a stage's thread waits for other workers: without the device, and unwatched."""
        began = time.perf_counter()
        try:
            with nullcontext() if self._watchdog is None else self._watchdog.paused(), self._device.released():
                yield
        finally:
            job.waited_seconds += time.perf_counter() - began

    def _outputs(self, job: StageJob, call: Call) -> dict[str, Packet]:
        """The outputs of the stages."""
        contract = self._stages.contract_of(call.variant)
        values = {
            slot: unpack(slot, artifact_class(contract.inputs[slot]), job.inputs.pop(slot), self._leaf)
            for slot in list(job.inputs)
        }
        with nullcontext(call) if self._watchdog is None else self._watchdog.watch(call, job.fail) as watched:
            outputs = self._stages.run({**values, **job.feeds}, watched)
        try:
            return {slot: pack(slot, artifact, self._leaf) for slot, artifact in outputs.items()}
        except InvalidInput as error:
            raise InternalError(f"{contract.name} made something that cannot travel: {error}") from error

    async def _answer(self, write: Write, outputs: Mapping[str, Packet], leave: Callable[[], None]) -> None:
        """Send the outputs. The place is given back before the last frame: who has read it may call again."""
        with span("send outputs", bytes=sum(packet.byte_size for packet in outputs.values())):
            frame = header_frame(self._reply, outputs)
            for packet in outputs.values():
                for following in chunk_frames(packet.chunks):
                    await write(frame)
                    frame = following
            leave()
            await write(frame)


def _prompts(inputs: Mapping[str, Packet]) -> Iterator[str]:
    """The texts of the prompts among the inputs of a call."""
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
