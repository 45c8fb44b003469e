"""Scales a fleet of real processes from zero and back while clients use it, and ends workers during their requests.

    python tests/fleet/chaos/run_autoscale.py --requests 200 --scale-ins 100

One coordinator, and for each service of the emoji model the autoscaler of `fleet up --autoscale`, which starts and ends
worker processes. First all requests come at once to a fleet without workers. Then waves of requests follow, so that
the load rises and falls, until there were so many scale-ins while requests ran. At the end every request has
succeeded, every image has the bytes that one process draws, and no worker is left.

Ends with 1 and prints what did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported

import torch  # noqa: E402
from autoscaled_fleet import AutoscaledFleet, Story  # noqa: E402

from common.errors import FleetError, Unavailable  # noqa: E402
from common.state.connection import connect as connect_store  # noqa: E402
from fleet.v1 import generation_pb2 as pb  # noqa: E402
from local_fleet import open_fleet  # noqa: E402
from models.catalog import open_model  # noqa: E402
from models.registry import load_registry  # noqa: E402
from redis_servers import running_server  # noqa: E402
from served_fleet import Answer, collect  # noqa: E402
from services.cli.client import FleetClient, connect  # noqa: E402
from services.cli.parameters import parameters_message  # noqa: E402
from services.cli.replica_policy import ReplicaBounds  # noqa: E402

_MODEL = "emoji"
_DENOISERS = 4
_TARGET_SECONDS = 0.2
_IDLE_SECONDS = 0.4
_IMAGES = 8
_WAVE = 2 * _DENOISERS
_LONG = 2
"""Requests of a wave that take longer."""
_LONG_STEPS = 12
"""How many times as many steps they have."""
_BOUNDS = {
    service: ReplicaBounds(0, most, _IDLE_SECONDS)
    for service, most in {"text_encoding": 2, "latent_preparation": 1, "denoising": _DENOISERS, "decoding": 2}.items()
}
_SETTLE_SECONDS = 60.0
_RETRY_SECONDS = 0.2
_PUSH_SECONDS = 1.0
"""Most seconds from the first request to the start of the first worker."""


@dataclass(frozen=True)
class Image:
    """What a client asks for. Equal ones have equal bytes."""

    seed: int
    steps: int

    @property
    def given(self) -> dict[str, Any]:
        """The parameters of its request."""
        return {"prompt": "a red apple", "seed": self.seed, "num_inference_steps": self.steps}


@dataclass(frozen=True)
class Load:
    """What a run does: `requests` that come at once, then waves until `scale_ins` came while requests ran.

    Most requests have `steps` steps. The first two of each wave have more, so that they still run when workers end.
    """

    requests: int
    scale_ins: int
    steps: int = 4

    @property
    def burst(self) -> list[Image]:
        """The images of the first requests."""
        return [Image(number % _IMAGES, self.steps) for number in range(self.requests)]

    @property
    def wave(self) -> list[Image]:
        """The images of a wave."""
        long = _LONG_STEPS * self.steps
        return [Image(number % _IMAGES, long if number < _LONG else self.steps) for number in range(_WAVE)]


@dataclass(frozen=True)
class Report:
    """What a run found. Seconds are those of the burst, of the waves, and of the push.

    `answered` counts requests, `refused` the submissions that were answered UNAVAILABLE and sent again.
    """

    story: Story
    answered: int
    refused: int
    burst_seconds: float
    wave_seconds: float
    push_seconds: float

    def table(self) -> str:
        """A line a figure."""
        most = ", ".join(f"{service} {count}" for service, count in self.story.most.items())
        rows = {
            "requests, each with the right bytes": f"{self.answered}",
            "submissions that were refused and sent again": f"{self.refused}",
            "seconds from the first request to the first worker's start": f"{self.push_seconds:.2f}",
            "seconds of the burst from zero": f"{self.burst_seconds:.1f}",
            "seconds of the waves": f"{self.wave_seconds:.1f}",
            "most workers": most,
            "scale-outs": f"{self.story.scale_outs}",
            "scale-ins": f"{len(self.story.scale_ins)}",
            "scale-ins while requests ran": f"{self.story.during_requests}",
            "scale-ins of workers that ran a request": f"{self.story.of_busy_workers}",
        }
        return "\n".join(f"{name:60}{value}" for name, value in rows.items())


def make_references(load: Load) -> dict[Image, bytes]:
    """The files of all images, drawn in this process by the same stages on one thread, as workers have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    local = open_fleet(_MODEL)
    references: dict[Image, bytes] = {}
    for image in dict.fromkeys((*load.burst, *load.wave)):
        (item,) = local.media(**image.given).items
        references[image] = item.data.numpy().tobytes()
    local.close()
    torch.set_num_threads(threads)
    return references


class Run:
    """One run: a burst from zero, and waves."""

    def __init__(self, load: Load, fleet: AutoscaledFleet, references: Mapping[Image, bytes]) -> None:
        self._load = load
        self._fleet = fleet
        self._references = references
        self._findings = fleet.story.findings
        self._answered = 0
        self._refused = 0

    async def run(self) -> Report:
        """Start at zero, go up, come back, twice."""
        await self._fleet.start(_TARGET_SECONDS)
        async with connect(self._fleet.endpoint) as client:
            began = time.monotonic()
            await self._send(client, self._load.burst)
            burst_seconds = time.monotonic() - began
            push_seconds = min(self._fleet.story.started.values()) - began
            await self._come_back()
            began, before = time.monotonic(), self._fleet.story.during_requests
            while self._fleet.story.during_requests - before < self._load.scale_ins and not self._findings:
                await self._send(client, self._load.wave)
            wave_seconds = time.monotonic() - began
            await self._come_back()
        self._check_story(push_seconds)
        return Report(self._fleet.story, self._answered, self._refused, burst_seconds, wave_seconds, push_seconds)

    async def _send(self, client: FleetClient, images: Sequence[Image]) -> None:
        """Ask for all images at once, and check each."""
        await asyncio.gather(*(self._ask(client, image) for image in images))

    async def _ask(self, client: FleetClient, image: Image) -> None:
        """Ask for an image, and compare it."""
        parameters = parameters_message(image.given, (), ".png")
        request = pb.SubmitRequest(model=_MODEL, parameters=parameters, idempotency_key=secrets.token_hex(8))
        answer = Answer(pb.RequestRecord(), [], [])
        try:
            await self._collect(client, request, answer)
        except FleetError as error:
            self._findings.append(f"request {answer.record.request_id} of {image} ended with {error}")
            return
        if answer.files != [self._references[image]]:
            self._findings.append(f"request {answer.record.request_id} of {image} has other bytes than its reference")
            return
        self._answered += 1

    async def _collect(self, client: FleetClient, request: pb.SubmitRequest, answer: Answer) -> None:
        """Submit until the request is accepted, as UNAVAILABLE asks for. From then on, every error is raised."""
        while True:
            try:
                return await collect(client, request, answer)
            except Unavailable:
                if answer.record.request_id:
                    raise
            self._refused += 1
            await asyncio.sleep(_RETRY_SECONDS)

    async def _come_back(self) -> None:
        """Wait until no worker runs."""
        give_up = time.monotonic() + _SETTLE_SECONDS
        while not self._fleet.is_at_zero:
            if time.monotonic() > give_up:
                sizes = {service: (pool.size, pool.ending) for service, pool in self._fleet.pools.items()}
                self._findings.append(f"workers are left {_SETTLE_SECONDS:g} s after the last request: {sizes}")
                return
            await asyncio.sleep(0.05)

    def _check_story(self, push_seconds: float) -> None:
        if push_seconds > _PUSH_SECONDS:
            self._findings.append(f"the first worker was started {push_seconds:.2f} s after the first request")
        for service, most in self._fleet.story.most.items():
            if most > _BOUNDS[service].most:
                self._findings.append(f"{service} had {most} workers, of at most {_BOUNDS[service].most}")
        if self._fleet.story.most["denoising"] < _BOUNDS["denoising"].most:
            self._findings.append(f"denoising had {self._fleet.story.most['denoising']} workers at most")


async def _run(load: Load, directory: Path, references: Mapping[Image, bytes], url: str) -> Report:
    model = open_model(_MODEL, load_registry())
    async with connect_store(url) as redis:
        fleet = AutoscaledFleet(model, directory, redis, url, _BOUNDS)
        try:
            return await Run(load, fleet, references).run()
        finally:
            await fleet.close()


def run_autoscale(load: Load, directory: Path) -> Report:
    """Run a load; logs and sockets go to `directory`, whose path must be short enough for unix sockets."""
    references = make_references(load)
    with running_server("valkey") as server:
        return asyncio.run(_run(load, directory, references, server.url))


def main(argv: Sequence[str] | None = None) -> int:
    """Run once, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--requests", type=int, default=200, help="requests of the burst from zero (default: 200)")
    parser.add_argument("--scale-ins", type=int, default=100, help="scale-ins while requests run (default: 100)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a short request (default: 4)")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="scale-"))
    report = run_autoscale(Load(args.requests, args.scale_ins, args.steps), directory)
    sys.stdout.write(f"{report.table()}\n")
    if report.story.findings:
        lines = "\n".join((*report.story.notes, f"findings (logs are in {directory}):", *report.story.findings))
        sys.stdout.write(f"{lines}\n")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
