"""A fleet at five times the load that it can serve, with its queue bounded to one service time.

First the service time is measured: the time of a request in an idle fleet. Then requests arrive in a Poisson process,
first from one caller, then from two callers: one with 4.8 times and one with 0.2 times the capacity of the fleet. The
output has the times of accepted requests and rejections, the accepted fraction of each caller's requests, and the
memory of the coordinator and Redis. Run it with: python tests/bench/overload.py
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from bench_fleet import RunningFleet, running_fleet
from bench_report import median, print_machine, print_table, print_verdict, quantile, say

from common.errors import ResourceExhausted
from common.rpc.status import from_rpc_error
from fleet.v1 import generation_pb2 as api
from fleet.v1 import generation_pb2_grpc

CALLERS = ("greedy", "modest")
LOAD = 5.0  # load of all callers, as a multiple of the capacity
MODEST_LOAD = 0.2  # load of the second caller, as a multiple of the capacity
TIMES_SERVICE = 3.0  # budget of an accepted request, in service times
BEYOND = 0.5  # fraction of the queue bound that a second caller may add after the first caller has filled it
REJECTION_MS = 50.0  # budget of a rejection
GROWTH_MIB = 4.0  # budget of the memory growth of a process
KEPT_SECONDS = 5  # retention of ended requests; short, so that the store's size is soon constant
MIB = 1 << 20


@dataclass
class Phase:
    """Results of one phase: times in seconds by caller, and memory in bytes by process over time.

    `delays` are the retry delays of all rejections, in seconds.
    """

    accepted: dict[str, list[float]] = field(default_factory=dict)
    rejected: dict[str, list[float]] = field(default_factory=dict)
    delays: list[float] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)


class Client:
    """Sends requests as several callers over one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        self._seed = 0

    async def generate(self, caller: str) -> None:
        """Run one request to its image. Raises FleetError."""
        self._seed += 1
        parameters = api.GenerationParameters(prompt=f"a red apple, image {self._seed}", seed=self._seed)
        request = api.GenerateRequest(request=api.SubmitRequest(parameters=parameters))
        received = 0
        try:
            async for reply in self._stub.Generate(request, metadata=(("authorization", f"Bearer {caller}"),)):
                received += len(reply.data)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        if not received:
            raise RuntimeError("a request ended without an image")

    async def note(self, caller: str, phase: Phase) -> None:
        """Run one request and record its time, as accepted or rejected."""
        began = time.perf_counter()
        try:
            await self.generate(caller)
        except ResourceExhausted as refusal:
            phase.rejected.setdefault(caller, []).append(time.perf_counter() - began)
            phase.delays.append(refusal.retry_seconds or 0.0)
        else:
            phase.accepted.setdefault(caller, []).append(time.perf_counter() - began)


async def run_phase(client: Client, rates: Mapping[str, float], seconds: float, fleet: RunningFleet) -> Phase:
    """Send requests at `rates` (per second, by caller) for `seconds`; returns when all requests are over."""
    phase = Phase()
    async with asyncio.TaskGroup() as group:
        watching = asyncio.create_task(watch_memory(fleet, phase.memory))
        end = time.monotonic() + seconds

        async def arrive(caller: str, rate: float) -> None:
            while time.monotonic() < end:
                await asyncio.sleep(random.expovariate(rate))
                group.create_task(client.note(caller, phase))

        for caller, rate in rates.items():
            group.create_task(arrive(caller, rate))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return phase


async def watch_memory(fleet: RunningFleet, memory: dict[str, list[int]]) -> None:
    """Record the resident memory of the coordinator and the store twice a second."""
    watched = {name: process_of(fleet, word) for name, word in (("coordinator", "coordinator"), ("Redis", "valkey"))}
    while True:
        for name, process in watched.items():
            memory.setdefault(name, []).append(process.memory_info().rss)
        await asyncio.sleep(0.5)


def process_of(fleet: RunningFleet, word: str) -> psutil.Process:
    """The fleet's process with `word` in its command line."""
    for process in psutil.Process(fleet.process_id).children(recursive=True):
        if any(word in part for part in process.cmdline()[:6]):
            return process
    raise RuntimeError(f"the fleet has no process with {word!r} in its command line")


async def service_time(endpoint: str, requests: int) -> float:
    """Measure the seconds of a request in an idle fleet, after a warm-up."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        client = Client(channel)
        times = []
        for _ in range(requests + 3):
            began = time.perf_counter()
            await client.generate(CALLERS[0])
            times.append(time.perf_counter() - began)
    return median(times[3:])


async def overload(fleet: RunningFleet, service: float, seconds: float) -> dict[str, Phase]:
    """Run both phases, each on an idle fleet."""
    rates = {
        "one caller": {"greedy": LOAD / service},
        "two callers": {"greedy": (LOAD - MODEST_LOAD) / service, "modest": MODEST_LOAD / service},
    }
    async with grpc.aio.insecure_channel(fleet.endpoint) as channel:
        client = Client(channel)
        for _ in range(5):  # so that the fleet has measured its pace
            await client.generate(CALLERS[0])
        return {name: await run_phase(client, each, seconds, fleet) for name, each in rates.items()}


def keys_file(directory: Path) -> Path:
    """A file of callers, whose API keys are their names."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in CALLERS}
    path = directory / "keys.toml"
    path.write_text("".join(f'[callers.{name}]\nkey_sha256 = ["{digest}"]\n' for name, digest in digests.items()))
    return path


def growth(sizes: Sequence[int]) -> float:
    """Growth in MiB between the medians of a phase's second and last quarter."""
    quarter = len(sizes) // 4
    return (median(sizes[-quarter:]) - median(sizes[quarter : 2 * quarter])) / MIB


def report(phases: Mapping[str, Phase], service: float, seconds: float) -> None:
    """Print the results and the comparisons with the budgets."""
    rows = []
    for name, phase in phases.items():
        for caller in phase.accepted.keys() | phase.rejected.keys():
            accepted, rejected = phase.accepted.get(caller, []), phase.rejected.get(caller, [])
            share = f"{100 * len(accepted) / (len(accepted) + len(rejected)):.0f}%"
            p95 = quantile(accepted, 0.95) / service if accepted else float("nan")
            rows.append((f"{name}: {caller}", len(accepted) + len(rejected), len(accepted), share, p95))
    print_table(("", "requests", "accepted", "accepted fraction", "p95 of accepted, service times"), rows)
    for name, phase in phases.items():
        done = [each for times in phase.accepted.values() for each in times]
        refused = [1e3 * each for times in phase.rejected.values() for each in times]
        say(
            f"{name}: the utilization of the fleet was {len(done) * service / seconds:.2f}. Medians of rejections: "
            f"{median(refused):.1f} ms until the reply, retry delay of {median(phase.delays):.2f} s."
        )
        budget = TIMES_SERVICE + BEYOND * (len(phase.accepted) - 1)
        print_verdict(f"{name}: p95 of accepted requests", quantile(done, 0.95) / service, budget, "times")
        print_verdict(f"{name}: p99 of rejections", quantile(refused, 0.99), REJECTION_MS, "ms")
        for process, sizes in phase.memory.items():
            print_verdict(
                f"{name}: growth of {process} (at most {max(sizes) / MIB:.0f} MiB)", growth(sizes), GROWTH_MIB, "MiB"
            )


def main() -> None:
    """Measure both phases and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds per phase")
    args = parser.parse_args()
    random.seed(0)
    print_machine(f"Overload: {args.model}, {LOAD:g} times the capacity for {args.seconds:g} s, one caller, then two")
    with tempfile.TemporaryDirectory() as directory:
        settings = {"FLEET_API_KEYS": str(keys_file(Path(directory))), "FLEET_API_KEY": CALLERS[0]}
        with running_fleet("--model", args.model, settings=settings) as fleet:
            service = asyncio.run(service_time(fleet.endpoint, 10))
        say(f"A request takes {1e3 * service:.0f} ms in an idle fleet. This service time is the queue bound.")
        say()
        settings |= {
            "FLEET_QUEUE_SECONDS": f"{service:.3f}",
            "FLEET_RECORD_SECONDS": f"{KEPT_SECONDS}",
            "FLEET_RESULT_SECONDS": f"{KEPT_SECONDS}",
        }
        with running_fleet("--model", args.model, settings=settings) as fleet:
            phases = asyncio.run(overload(fleet, service, args.seconds))
    report(phases, service, args.seconds)


if __name__ == "__main__":
    main()
