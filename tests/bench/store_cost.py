"""Cost of a request and of a step at the coordinator and Redis: CPU seconds, scripts and bytes.

Worker slots are claimed and released at a service with 100 and 1,000 live workers. Then requests with few and with many
steps run sequentially on a fleet of processes; the difference is the cost of a step. Redis syncs the writes of one
event-loop iteration together, so a write is cheaper under load: each figure is measured with appendfsync always and
with appendfsync no. The numbers of coordinators and Redis servers for a number of GPUs follow from these costs. Run it
with: python tests/bench/store_cost.py
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

import psutil
from bench_fleet import Caller, RunningFleet, running_fleet
from bench_report import print_machine, print_table, say
from overload import process_of
from redis.asyncio import Redis as AsyncRedis

from common.state.connection import command, connect
from common.state.embedded import EmbeddedStore
from common.state.presence import Presence
from common.state.worker_slots import WorkerSlots
from common.state.workers import WorkerRegistry
from fleet.v1 import generation_pb2 as api
from fleet.v1 import worker_pb2

FEW_STEPS, MANY_STEPS = 2, 22
WARM_UP = 2
Sync = Literal["always", "no"]

WORKERS = (100, 1_000)
AT_A_TIME = (1, 40)
SYNCS: tuple[Sync, ...] = ("always", "no")


@dataclass(frozen=True)
class Counters:
    """CPU seconds of coordinator and Redis, scripts run by Redis, and bytes that it received and sent."""

    coordinator: float
    redis: float
    scripts: float
    received: float
    sent: float

    def since(self, before: Counters) -> Counters:
        """Difference to earlier counters."""
        return Counters(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    def scaled(self, factor: float) -> Counters:
        """All counters multiplied by a factor."""
        return Counters(*(factor * each for each in astuple(self)))


async def read_counters(url: str, coordinator: psutil.Process | None = None) -> Counters:
    """Read the counters of a Redis server and of a coordinator process."""
    redis = AsyncRedis.from_url(url)
    info = await command(redis, "INFO", "everything")
    await redis.aclose()
    spent = coordinator.cpu_times() if coordinator else None
    return Counters(
        coordinator=spent.user + spent.system if spent else 0.0,
        redis=info["used_cpu_user"] + info["used_cpu_sys"],
        scripts=sum(info.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "fcall", "eval")),
        received=info["total_net_input_bytes"],
        sent=info["total_net_output_bytes"],
    )


def cost_of_requests(fleet: RunningFleet, url: str, steps: int, requests: int) -> tuple[Counters, float]:
    """Counters per request of `steps` steps, and seconds per request.

    The counters include the cost of the idle fleet in these seconds.
    """
    coordinator = process_of(fleet, "coordinator")
    caller = Caller(fleet.endpoint)
    before, began = Counters(0, 0, 0, 0, 0), 0.0
    for number in range(WARM_UP + requests):
        if number == WARM_UP:
            before, began = asyncio.run(read_counters(url, coordinator)), time.perf_counter()
        prompt = f"a red apple, image {steps} {number}"
        caller.generate(api.GenerationParameters(prompt=prompt, seed=number, num_inference_steps=steps))
    seconds = (time.perf_counter() - began) / requests
    spent = asyncio.run(read_counters(url, coordinator)).since(before).scaled(1 / requests)
    caller.close()
    return spent, seconds


def cost_of_idling(fleet: RunningFleet, url: str, seconds: float) -> Counters:
    """Counters of one second without requests: heartbeats of the coordinator and four workers."""
    coordinator = process_of(fleet, "coordinator")
    before = asyncio.run(read_counters(url, coordinator))
    time.sleep(seconds)
    return asyncio.run(read_counters(url, coordinator)).since(before).scaled(1 / seconds)


async def cost_of_claims(url: str, workers: int, at_a_time: int, claims: int) -> float:
    """Redis CPU seconds of a claim and its release. The service has `workers` live workers, half of them busy."""
    redis = connect(url)
    await command(redis, "FLUSHALL")
    registry = WorkerRegistry(redis, heartbeat_seconds=3_600, ttl_seconds=36_000)
    presence = Presence(redis, "bench")
    slots = WorkerSlots(redis, presence)
    await presence.start()
    for number in range(workers):
        await registry.announce(_worker(number))
    for number in range(workers // 2):
        await slots.claim("model", "denoising", f"held-{number}")

    async def claim_in_turn(first: int) -> None:
        for number in range(first, claims, at_a_time):
            slots.release(await slots.claim("model", "denoising", f"request-{number}"), 1.0)

    before = await read_counters(url)
    await asyncio.gather(*(claim_in_turn(number) for number in range(at_a_time)))
    await slots.settle()
    spent = (await read_counters(url)).since(before).redis / claims
    await presence.stop()
    await redis.aclose()
    return spent


def _worker(number: int) -> worker_pb2.WorkerInfo:
    contract = worker_pb2.StageContract(stages=["DenoisingStage"], inputs={"canvas": "Canvas"})
    return worker_pb2.WorkerInfo(
        worker_id=f"worker-{number}",
        service="denoising",
        model="model",
        model_fingerprint="f",
        capacity=1,
        address=f"10.0.{number // 256}.{number % 256}:50051",
        contract=contract,
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20, help="measured requests per number of steps")
    parser.add_argument("--claims", type=int, default=400, help="claims per measurement")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="duration of the idle measurement")
    args = parser.parse_args()
    print_machine(f"Cost of a request at coordinator and Redis, {args.requests} requests per number of steps")
    report_claims(args.claims)
    for sync in SYNCS:
        say(f"appendfsync {sync}:")
        say()
        report(cost_by_part(sync, args.requests, args.idle_seconds))
    say("hops.py prints the coordinator's CPU time per hop, by payload size.")


def cost_by_part(sync: Sync, requests: int, idle_seconds: float) -> Mapping[str, Counters]:
    """Measure the cost of the parts of a request."""
    with (
        EmbeddedStore(appendfsync=sync) as store,
        running_fleet("--model", "emoji", "--redis", store.url) as fleet,
    ):
        idle = cost_of_idling(fleet, store.url, idle_seconds)
        few, few_seconds = cost_of_requests(fleet, store.url, FEW_STEPS, requests)
        many, many_seconds = cost_of_requests(fleet, store.url, MANY_STEPS, requests)
    few, many = few.since(idle.scaled(few_seconds)), many.since(idle.scaled(many_seconds))
    step = many.since(few).scaled(1 / (MANY_STEPS - FEW_STEPS))
    return {"a second of the idle fleet": idle, "a step": step, "a request without steps": _whole(few, step)}


def _whole(few: Counters, step: Counters) -> Counters:
    return few.since(step.scaled(FEW_STEPS))


def report(costs: Mapping[str, Counters]) -> None:
    """Print the costs of requests."""
    header = ("", "coordinator CPU, ms", "Redis CPU, ms", "scripts", "KB to Redis", "KB from Redis")
    rows = [
        (name, 1e3 * each.coordinator, 1e3 * each.redis, each.scripts, each.received / 1e3, each.sent / 1e3)
        for name, each in costs.items()
    ]
    print_table(header, rows)


def report_claims(claims: int) -> None:
    """Measure and print the Redis cost of a claim, by number of workers and of concurrent claims."""
    rows = []
    for sync in SYNCS:
        with EmbeddedStore(appendfsync=sync) as store:
            for at_a_time in AT_A_TIME:
                costs = [1e3 * asyncio.run(cost_of_claims(store.url, each, at_a_time, claims)) for each in WORKERS]
                rows.append((sync, at_a_time, *costs))
    print_table(("appendfsync", "concurrent claims", *(f"{each} workers: Redis CPU, ms" for each in WORKERS)), rows)


if __name__ == "__main__":
    main()
