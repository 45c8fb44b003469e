"""Latency of a hop between stages by payload size.

Producer, coordinator and consumer are three processes. The output has the whole hop (from the end of the producer's
stage to the start of the consumer's), its two halves, its parts other than transfer (measured separately on one
thread), a raw TCP transfer of as many bytes into an existing buffer, the longest stall of the coordinator's event loop,
and the coordinator's memory above its idle state. Sizes are Flux's latents and embeddings, Wan's latents, and a large
one. Run it with: python tests/bench/hops.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from bench_report import median, print_machine, print_table, print_verdict, quantile, say
from bench_stages import PAYLOAD, ROUTE, payload_of, serving, without_optional_slots

from common.artifacts import Conditioning, LatentPart, Latents, Prompt, Sampling, Schedule
from common.codec import pack, unpack
from common.rpc.buffers import BufferPool
from common.rpc.client import RemoteRunner, header_frame, open_channel
from common.rpc.frames import read_chunk
from common.rpc.framing import Assembler, CallLimits, KeptFrames, Packet, PooledPayload, StoreFactory, described_tensors
from common.rpc.framing import chunk_frames as frames_of
from common.rpc.method import request_type, stage_method
from common.stage import Call, compose_contracts
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2 as pb
from models import contracts

MIB = 1 << 20
SIZES = {
    "0.5 MB: Flux latents": MIB // 2,
    "4 MB: Flux embeddings": 4 * MIB,
    "8 MB: Wan latents": 8 * MIB,
    "64 MB": 64 * MIB,
}
HOP_BUDGET_MS = {4 * MIB: 8.0, 8 * MIB: 14.0}
LARGE_GB_PER_SECOND = 1.0
LARGE_TIMES_TCP = 3.0
STALL_MS = 25.0
UNDER_WAY_MIB = 32.0  # budget for frames in flight, and for memory of smaller payloads that malloc retains
# A FLUX.1-dev request of 28 steps takes about 3.6 s on one H100, with one hop of embeddings and two of latents.
REQUEST_MS = 3600.0
REQUEST_SHARE = 0.01  # budget of its hops, as a fraction
MALLOC = "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=4"


@dataclass
class Route:
    """Times in ms of every measured hop of one size, and the coordinator's stalls and memory."""

    hop: list[float] = field(default_factory=list)
    first_half: list[float] = field(default_factory=list)
    second_half: list[float] = field(default_factory=list)
    stall: float = 0.0
    memory: int = 0
    cpu: float = 0.0
    """CPU time in ms of the coordinator's process per hop, including its checks of the payload."""


class Coordinator:
    """The packet-moving part of the coordinator: two runners in sequence."""

    def __init__(self, producer: grpc.aio.Channel, consumer: grpc.aio.Channel) -> None:
        encode = compose_contracts("text_encoding", [contracts.TEXT_ENCODING])
        denoise = compose_contracts("denoising", [without_optional_slots(contracts.DENOISING)])
        self._encode = RemoteRunner(producer, "text_encoding", encode)
        self._denoise = RemoteRunner(consumer, "denoising", denoise)
        self._given = _small_artifacts()

    async def relay(self, size: int) -> tuple[int, int, int]:
        """Move a payload between the stages.

        Returns the times of its sending, of its complete receipt here, and of the start of the consumer, in ns of the
        monotonic clock.
        """
        call = Call("bench")
        given = {**self._given, "prompt": pack("prompt", Prompt(prompt=str(size)))}
        encoded = await self._encode({name: given[name] for name in ("prompt", "sampling")}, call)
        here = time.monotonic_ns()
        inputs = {name: packet for name, packet in given.items() if name != "prompt"}
        outputs = await self._denoise({**inputs, **encoded}, call)
        latents = unpack("denoised_latents", Latents, outputs["denoised_latents"], TORCH)
        sent, begun = latents.parts[ROUTE].latents.tolist()
        return sent, here, begun


def _small_artifacts() -> dict[str, Packet]:
    """The denoiser's other inputs, small enough to be sent in the header."""
    one = payload_of(64).float()
    artifacts = {
        "sampling": Sampling(num_inference_steps=1, seed=0),
        "schedule": Schedule(timesteps=one, sigmas=one, num_inference_steps=1),
        "initial_latents": Latents(parts={"image": LatentPart(latents=one, raw_latent_shape=(16,))}),
    }
    return {slot: pack(slot, artifact, TORCH) for slot, artifact in artifacts.items()}


async def measure(coordinator: Coordinator, size: int, repeats: int, idle: int) -> Route:
    """Relay a payload repeatedly; the first hops are warm-up. `idle` is the resident memory before any hop."""
    route = Route()
    with _memory(route, idle):
        for _ in range(5):
            await coordinator.relay(size)
        before = time.process_time()
        async with _stalls(route):
            for _ in range(repeats):
                sent, here, begun = await coordinator.relay(size)
                route.hop.append((begun - sent) / 1e6)
                route.first_half.append((here - sent) / 1e6)
                route.second_half.append((begun - here) / 1e6)
        route.cpu = 1e3 * (time.process_time() - before) / repeats
    return route


@asynccontextmanager
async def _stalls(route: Route) -> AsyncIterator[None]:
    """Record the largest delay with which the event loop wakes a task that sleeps for 1 ms."""

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            route.stall = max(route.stall, 1e3 * (time.monotonic() - before) - 1)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


@contextmanager
def _memory(route: Route, idle: int) -> Iterator[None]:
    """Record by how much this process's peak resident memory exceeds `idle`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    yield
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    route.memory = max(0, peak - idle)


def parts_of(size: int, repeats: int) -> dict[str, float]:
    """Times in ms without transfer: packing and serializing, the coordinator's checks, and unpacking."""
    conditioning = Conditioning(prompt_embeds={PAYLOAD: payload_of(size)})
    frame = request_type(stage_method("denoising"))
    pool = BufferPool()
    parts: dict[str, list[float]] = {"serialize": [], "check": [], "deserialize": []}
    for _ in range(repeats):
        began = time.perf_counter()
        packet = pack("text_conditioning", conditioning, TORCH)
        header = header_frame(frame, {"text_conditioning": packet})
        frames = list(frames_of(packet.chunks))
        serialized = time.perf_counter()
        _assemble(frame, header, frames, KeptFrames)
        kept = time.perf_counter()
        lease = pool.lease()
        received = _assemble(frame, header, frames, partial(PooledPayload, lease=lease))
        result = unpack("text_conditioning", Conditioning, received, TORCH)
        done = time.perf_counter()
        del received, result
        lease.close()
        for name, spent in zip(parts, (serialized - began, kept - serialized, done - kept), strict=True):
            parts[name].append(1e3 * spent)
    return {name: median(values) for name, values in parts.items()}


def _assemble(frame: Any, header: bytes, frames: list[bytes], store: StoreFactory) -> Packet:
    message: pb.Conditioning = frame.FromString(header).header.text_conditioning
    assembler = Assembler(described_tensors("text_conditioning", message, CallLimits()), store)
    for raw in frames:
        chunk = read_chunk(raw)
        assert chunk is not None
        assembler.add(chunk)
    return Packet(message, assembler.finish())


@contextmanager
def raw_tcp(directory: Path) -> Iterator[Callable[[int, int], float]]:
    """Baseline: yields a function for the median time in ms of `repeats` raw TCP transfers of a size."""
    port_file = directory / "port"
    with ExitStack() as stack:
        stack.enter_context(serving("raw", str(port_file)))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", int(port_file.read_text()))))
        buffer = memoryview(bytearray(max(SIZES.values())))

        def transfer(size: int) -> float:
            began = time.perf_counter()
            client.sendall(size.to_bytes(8, "big"))
            received = 0
            while received < size:
                received += client.recv_into(buffer[received:size])
            return 1e3 * (time.perf_counter() - began)

        yield lambda size, repeats: median([transfer(size) for _ in range(repeats + 5)][5:])


async def main() -> None:
    """Measure every size, print the tables, and compare with the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50, help="measured hops of each size")
    args = parser.parse_args()
    print_machine(f"Hops between processes of one host, {args.repeats} of each size")
    routes: dict[int, Route] = {}
    tcp: dict[int, float] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = {service: f"unix:{directory}/{service}.sock" for service in ("text_encoding", "denoising")}
        for service, address in addresses.items():
            stack.enter_context(serving(service, address))
        channels = [open_channel(address) for address in addresses.values()]
        coordinator = Coordinator(*channels)
        transfer = stack.enter_context(raw_tcp(directory))
        await coordinator.relay(MIB // 8)
        idle = psutil.Process().memory_info().rss
        for size in SIZES.values():
            routes[size] = await measure(coordinator, size, args.repeats, idle)
            tcp[size] = transfer(size, args.repeats)
        for channel in channels:
            await channel.close()
    report(routes, {size: parts_of(size, args.repeats) for size in SIZES.values()}, tcp)


def report(routes: Mapping[int, Route], parts: Mapping[int, Mapping[str, float]], tcp: Mapping[int, float]) -> None:
    """Print the tables and the comparisons with the budgets."""
    rows = []
    for name, size in SIZES.items():
        route = routes[size]
        halves = (median(route.first_half), median(route.second_half))
        rest = median(route.hop) - sum(parts[size].values())
        spent = (*parts[size].values(), max(0.0, rest))
        worst = quantile(route.hop, 0.9)
        rows.append(
            (
                name,
                size,
                median(route.hop),
                worst,
                *halves,
                *spent,
                tcp[size],
                route.cpu,
                route.stall,
                route.memory / MIB,
            )
        )
    print_table(
        (
            "payload",
            "bytes",
            "hop, median ms",
            "hop, p90 ms",
            "to the coordinator, ms",
            "to the consumer, ms",
            "serialization, ms",
            "coordinator's checks, ms",
            "deserialization, ms",
            "transfer and rest, ms",
            "raw TCP one way, ms",
            "coordinator's CPU, ms",
            "longest stall, ms",
            "coordinator's memory, MiB",
        ),
        rows,
    )
    for size, budget in HOP_BUDGET_MS.items():
        print_verdict(f"hop of {size // MIB} MB", median(routes[size].hop), budget, "ms")
    flux = median(routes[4 * MIB].hop) + 2 * median(routes[MIB // 2].hop)
    print_verdict("all hops of a Flux request", flux, REQUEST_SHARE * REQUEST_MS, "ms")
    large = 64 * MIB
    slower = max(median(routes[large].first_half), median(routes[large].second_half))
    print_verdict("64 MB between two processes", large / 1e6 / slower, LARGE_GB_PER_SECOND, "GB/s", at_least=True)
    print_verdict("64 MB between two processes, relative to raw TCP", slower / tcp[large], LARGE_TIMES_TCP, "times")
    beyond = (routes[large].memory - large) / MIB
    print_verdict("memory of the coordinator at 64 MB, in addition to the payload", beyond, UNDER_WAY_MIB, "MiB")
    print_verdict("longest stall of the coordinator's loop", max(r.stall for r in routes.values()), STALL_MS, "ms")
    say()


if __name__ == "__main__":
    # The fleet's processes start with these tunables, which glibc reads only at process start.
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": MALLOC})
    asyncio.run(main())
