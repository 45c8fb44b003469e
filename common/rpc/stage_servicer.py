"""Serves a run of stages behind its service's RPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from traceback import clear_frames
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import Message

from common.codec import TensorLeaf, artifact_class, pack, unpack
from common.errors import DeadlineExceeded, HandedOver, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.rpc.buffers import BufferLease, BufferPool
from common.rpc.client import header_frame
from common.rpc.frame_reporter import FrameReporter
from common.rpc.frames import ChunkView, read_chunk
from common.rpc.framing import (
    Assembler,
    CallLimits,
    Packet,
    PooledPayload,
    chunk_frames,
    described_tensors,
    split_packets,
)
from common.rpc.hand_over import RunningCall, StepTimes
from common.rpc.method import (
    BEGUN_KEY,
    COMPUTED_KEY,
    VARIANT_KEY,
    begun_frame,
    check_contract,
    request_type,
    response_type,
    service_name,
    stage_method,
)
from common.rpc.parsing import parse, refuse_unknown_fields
from common.rpc.replies import Recorder, ReplyCache, Write
from common.rpc.watchdog import Watchdog
from common.rpc.wrapping import Context, Handler
from common.stage import Call, Contract
from common.telemetry import REQUEST_ID_KEY


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

    `capacity` calls run or wait for the device thread at a time; a peer that sends no frame for `idle_seconds`
    before its call is complete is given up. Steps are told at most every `step_seconds`, and the last one always.
    """

    capacity: int = 1
    idle_seconds: float = 30.0
    step_seconds: float = 0.0
    call: CallLimits = field(default_factory=CallLimits)


class StageServicer:
    """Puts stages behind the RPC of a service.

    Raises PipelineError when the stages' contract is not part of the RPC's messages. The stages run on `executor`,
    which has the one thread that may touch the device; unpacking and packing run there too, off the event loop. With a
    cache, a call whose inputs came before is answered from it. With a watchdog, a call that is stuck is answered with
    UNAVAILABLE, and so is each new one until the device thread is free.
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
    ) -> None:
        method = stage_method(service)
        check_contract(stages.contract, method)
        self.service_name = service_name(method)
        self._stages = stages
        self._executor = executor
        self._leaf = leaf
        self._limits = limits or ServicerLimits()
        self.pool = pool or BufferPool()
        self._cache = cache
        self._watchdog = watchdog
        self._request = request_type(method)
        self._reply = response_type(method)
        self._begun = begun_frame(self._reply)
        handler: Handler = grpc.stream_stream_rpc_method_handler(cast(Any, self._handle))
        self.methods: Mapping[str, Handler] = {method.name: handler}
        self.in_flight = 0
        self._jobs: list[_Job] = []

    def running(self) -> Sequence[RunningCall]:
        """The calls that have not ended, in the order in which they came."""
        return tuple(self._jobs)

    async def _handle(self, _requests: object, context: Context) -> None:
        with self._place() as leave:
            metadata = dict(context.invocation_metadata() or ())
            begun = self._begun if metadata.get(BEGUN_KEY) == "1" else None
            job = _Job(self.pool.lease(), _call_of(context, metadata), begun)
            self._jobs.append(job)
            try:
                await self._receive(context, job)
                if self._cache is None:
                    await self._compute_and_answer(context.write, job, leave)
                else:
                    await self._answer_through(self._cache, context.write, job, leave)
            finally:
                if job.seconds:
                    context.set_trailing_metadata(((COMPUTED_KEY, f"{job.seconds:.6f}"),))
                self._jobs.remove(job)
                job.abandon()

    async def _compute_and_answer(self, write: Write, job: _Job, leave: Callable[[], None]) -> None:
        outputs = await self._run(write, job)
        await self._answer(write, outputs, leave)

    async def _answer_through(self, cache: ReplyCache, write: Write, job: _Job, leave: Callable[[], None]) -> None:
        key = cache.key(job.inputs, job.call.variant)
        if (kept := await cache.find(key)) is not None:
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

    async def _receive(self, context: Context, job: _Job) -> None:
        """Read the header and the chunks that it announces, until half-close."""
        contract = self._stages.contract_of(job.call.variant)
        assembler: Assembler | None = None
        header: Message | None = None
        while (raw := await self._read(context)) is not None:
            chunk, frame = read_chunk(raw), None
            if chunk is None:
                frame = cast(Any, parse(self._request, raw))
                if frame.WhichOneof("frame") == "chunk":
                    chunk = ChunkView(frame.chunk.path, frame.chunk.offset, frame.chunk.data)
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

    async def _read(self, context: Context) -> bytes | None:
        """The next frame, None after the last. Raises DeadlineExceeded when the peer falls silent."""
        try:
            async with asyncio.timeout(self._limits.idle_seconds):
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
        for slot in contract.inputs:
            if slot not in present and slot not in contract.optional:
                raise InvalidInput(f"{slot} is missing; {contract.name} of this model needs it", field=slot)
        return header

    async def _run(self, write: Write, job: _Job) -> Mapping[str, Packet]:
        """Compute on the device thread; meanwhile send on what the stages report."""
        reporter = FrameReporter(self._reply, self._leaf, step_seconds=self._limits.step_seconds, begun=job.begun)
        job.start(self._executor, partial(self._compute, job, reporter), reporter.end)
        try:
            async for frame in reporter.frames():
                await write(frame)
        finally:
            reporter.release()
        return job.result()

    def _compute(self, job: _Job, reporter: FrameReporter) -> dict[str, Packet]:
        """Unpack, run, pack: on the device thread. Empties inputs, so that nothing but tensors holds on to buffers."""
        call = job.timed(reporter.listen(job.call))
        call.check_cancelled()
        job.begin()
        reporter.begin()
        began = time.perf_counter()
        try:
            return self._outputs(job, call)
        finally:
            job.seconds = time.perf_counter() - began  # packing waits for the device

    def _outputs(self, job: _Job, call: Call) -> dict[str, Packet]:
        """The outputs of the stages."""
        contract = self._stages.contract_of(call.variant)
        values = {
            slot: unpack(slot, artifact_class(contract.inputs[slot]), job.inputs.pop(slot), self._leaf)
            for slot in list(job.inputs)
        }
        with nullcontext(call) if self._watchdog is None else self._watchdog.watch(call, job.fail) as watched:
            outputs = self._stages.run(values, watched)
        try:
            return {slot: pack(slot, outputs[slot], self._leaf) for slot in contract.outputs}
        except InvalidInput as error:
            raise InternalError(f"{contract.name} made something that cannot travel: {error}") from error

    async def _answer(self, write: Write, outputs: Mapping[str, Packet], leave: Callable[[], None]) -> None:
        """Send the outputs. The place is given back before the last frame: who has read it may call again."""
        frame = header_frame(self._reply, outputs)
        for packet in outputs.values():
            for following in chunk_frames(packet.chunks):
                await write(frame)
                frame = following
        leave()
        await write(frame)


class _Job:
    """One call's work on the device thread, and the buffers that it reads, which outlive the call if need be.

    `begun` is the frame to send when the work starts; None for a caller that does not know such frames.
    """

    def __init__(self, lease: BufferLease, call: Call, begun: bytes | None) -> None:
        self.lease = lease
        self.call = call
        self.begun = begun
        self.inputs: dict[str, Packet] = {}
        self.seconds = 0.0  # that the stages took, also where they raised an error
        self.request_id = call.request_id
        self.step_times = StepTimes()
        self.has_begun = False
        self._failure: Unavailable | None = None
        self._end: Callable[[], None] = _do_nothing
        self._future: Future[dict[str, Packet]] | None = None

    def start(
        self, executor: ThreadPoolExecutor, work: Callable[[], dict[str, Packet]], on_end: Callable[[], None]
    ) -> None:
        """Queue the work; on_end is called on the event loop once it has ended, however, or fail() was called.

        Raises HandedOver where the call was asked for that before.
        """
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self._end = partial(_call_on, asyncio.get_running_loop(), on_end)
        self._future = executor.submit(_holding_nothing, work)
        self._future.add_done_callback(lambda _: self._end())

    def timed(self, call: Call) -> Call:
        """The same call, whose steps are timed."""

        def progress(step: int, total_steps: int) -> None:
            self.step_times.step(time.monotonic())
            call.on_progress(step, total_steps)

        return replace(call, on_progress=progress)

    def begin(self) -> None:
        """The stages start, on the device thread. Raises HandedOver where the call was asked for that before."""
        if self.is_asked:
            raise HandedOver(_NOT_BEGUN)
        self.has_begun = True
        self.step_times.begin(time.monotonic())

    @property
    def is_asked(self) -> bool:
        """Whether the call is being handed over."""
        return self.call.hand_over.is_set()

    def hand_over(self) -> None:
        """End with HandedOver: at once where the device thread has not begun, else at the next step boundary."""
        self.call.hand_over.set()
        if self._future is not None and self._future.cancel():
            self._failure = HandedOver(_NOT_BEGUN)

    def fail(self, reason: str) -> None:
        """Cancel the work, and end the call as UNAVAILABLE without waiting for the device thread. Thread-safe."""
        self._failure = Unavailable(reason)
        self.call.cancelled.set()
        self._end()

    def result(self) -> dict[str, Packet]:
        """What the work returned; raises what it raised, or the error of fail()."""
        if self._future is None:
            raise AssertionError("not started")
        if self._failure is not None and (
            not self._future.done() or self._future.cancelled() or self._future.exception() is not None
        ):
            raise self._failure
        return self._future.result()

    def abandon(self) -> None:
        """Stop the work within a step if it still runs, and free the buffers once it has ended."""
        self.call.cancelled.set()
        self.inputs.clear()
        if self._future is None or self._future.cancel() or self._future.done():
            self.lease.close()
        else:
            loop = asyncio.get_running_loop()
            self._future.add_done_callback(lambda _: _call_on(loop, self.lease.close))


_NOT_BEGUN = "this worker leaves; the call is handed over before it began"


def _call_of(context: Context, metadata: Mapping[str, str | bytes]) -> Call:
    remaining = context.time_remaining()
    return Call(
        str(metadata.get(REQUEST_ID_KEY, "")),
        deadline=None if remaining is None else time.monotonic() + remaining,
        variant=str(metadata.get(VARIANT_KEY, "")),
    )


def _do_nothing() -> None:
    return None


def _holding_nothing(work: Callable[[], dict[str, Packet]]) -> dict[str, Packet]:
    """Do the work. An error that it ends with keeps its traceback, but not the tensors that its frames refer to.

    Those lie over the call's buffers, which could else not be used again, and fill the device's memory.
    """
    try:
        return work()
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            clear_frames(cause.__traceback__)
            cause = cause.__context__
        raise


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call it on the event loop; one that has ended before the device thread's work did has nobody left to tell."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)
