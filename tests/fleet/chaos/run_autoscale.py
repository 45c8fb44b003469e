"""Scales a fleet of real processes from zero and back under load, and scales in busy workers.

    python tests/fleet/chaos/run_autoscale.py --requests 200 --scale-ins 100

The fleet has one coordinator and, for each service of the emoji model, the autoscaler of `fleet up --autoscale`, which
starts and ends worker processes. First, all requests arrive at once at a fleet without workers. Then waves of requests
raise and lower the load, until the number of scale-ins during requests is reached. At the end, every request must have
succeeded, every image must have the bytes of a single process, and no worker may be left.

The exit status is 1 if a check failed; findings are printed.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # grpc reads the variable at import

import torch  # noqa: E402
from autoscaled_fleet import AutoscaledFleet, ScalingHistory  # noqa: E402
from chaos_command import end_run, explain_findings, new_parser  # noqa: E402

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
"""Number of longer requests per wave."""
_LONG_STEPS = 12
"""Ratio of the longer requests' steps to the steps of the other requests."""
_BOUNDS = {
    service: ReplicaBounds(0, most, _IDLE_SECONDS)
    for service, most in {"text_encoding": 2, "latent_preparation": 1, "denoising": _DENOISERS, "decoding": 2}.items()
}
_SETTLE_SECONDS = 60.0
_RETRY_SECONDS = 0.2
_PUSH_SECONDS = 1.0
"""Longest time in seconds from the first request to the start of the first worker."""


@dataclass(frozen=True)
class Image:
    """A client's request. Equal requests have byte-equal images."""

    seed: int
    steps: int

    @property
    def given(self) -> dict[str, Any]:
        """The request's parameters."""
        return {"prompt": "a red apple", "seed": self.seed, "num_inference_steps": self.steps}


@dataclass(frozen=True)
class Load:
    """Load of a run: `requests` at once, then waves until `scale_ins` scale-ins happened during requests.

    Requests have `steps` steps; the first two of each wave have more, so that they still run at the scale-in.
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
    """Results of a run. `burst_seconds` and `wave_seconds` are durations of the burst and of all waves.

    `answered` counts requests with the expected bytes; `refused` counts submissions that were rejected with UNAVAILABLE
    and retried. `push_seconds` is the time from the first request to the start of the first worker.
    """

    history: ScalingHistory
    answered: int
    refused: int
    burst_seconds: float
    wave_seconds: float
    push_seconds: float

    def table(self) -> str:
        """Format one line per figure."""
        most = ", ".join(f"{service} {count}" for service, count in self.history.most.items())
        rows = {
            "requests with the expected bytes": f"{self.answered}",
            "submissions rejected and retried": f"{self.refused}",
            "seconds from the first request to the first worker's start": f"{self.push_seconds:.2f}",
            "seconds of the burst from zero": f"{self.burst_seconds:.1f}",
            "seconds of the waves": f"{self.wave_seconds:.1f}",
            "most workers": most,
            "scale-outs": f"{self.history.scale_outs}",
            "scale-ins": f"{len(self.history.scale_ins)}",
            "scale-ins while requests ran": f"{self.history.during_requests}",
            "scale-ins of workers that ran a request": f"{self.history.of_busy_workers}",
        }
        return "\n".join(f"{name:60}{value}" for name, value in rows.items())


def make_references(load: Load) -> dict[Image, bytes]:
    """Generate the files of all images in this process, with the same stages on one thread."""
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
    """A run: a burst from zero, then waves."""

    def __init__(self, load: Load, fleet: AutoscaledFleet, references: Mapping[Image, bytes]) -> None:
        self._load = load
        self._fleet = fleet
        self._references = references
        self._findings = fleet.history.findings
        self._answered = 0
        self._refused = 0

    async def run(self) -> Report:
        """Scale from zero and back twice: for the burst and for the waves."""
        await self._fleet.start(_TARGET_SECONDS)
        async with connect(self._fleet.endpoint) as client:
            began = time.monotonic()
            await self._send(client, self._load.burst)
            burst_seconds = time.monotonic() - began
            push_seconds = min(self._fleet.history.started.values()) - began
            await self._scale_to_zero()
            began, before = time.monotonic(), self._fleet.history.during_requests
            while self._fleet.history.during_requests - before < self._load.scale_ins and not self._findings:
                await self._send(client, self._load.wave)
            wave_seconds = time.monotonic() - began
            await self._scale_to_zero()
        self._check_history(push_seconds)
        return Report(self._fleet.history, self._answered, self._refused, burst_seconds, wave_seconds, push_seconds)

    async def _send(self, client: FleetClient, images: Sequence[Image]) -> None:
        """Request all images concurrently and check each."""
        await asyncio.gather(*(self._ask(client, image) for image in images))

    async def _ask(self, client: FleetClient, image: Image) -> None:
        """Request an image and compare it with its reference."""
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
        """Submit, with retries on UNAVAILABLE, until the request is accepted; after that, raise every error."""
        while True:
            try:
                return await collect(client, request, answer)
            except Unavailable:
                if answer.record.request_id:
                    raise
            self._refused += 1
            await asyncio.sleep(_RETRY_SECONDS)

    async def _scale_to_zero(self) -> None:
        """Wait until no worker runs."""
        give_up = time.monotonic() + _SETTLE_SECONDS
        while not self._fleet.is_at_zero:
            if time.monotonic() > give_up:
                sizes = {service: (pool.size, pool.ending) for service, pool in self._fleet.pools.items()}
                self._findings.append(f"workers still run {_SETTLE_SECONDS:g} s after the last request: {sizes}")
                return
            await asyncio.sleep(0.05)

    def _check_history(self, push_seconds: float) -> None:
        if push_seconds > _PUSH_SECONDS:
            self._findings.append(
                f"the first worker started {push_seconds:.2f} s after the first request, not within {_PUSH_SECONDS:g} s"
            )
        for service, most in self._fleet.history.most.items():
            if most > _BOUNDS[service].most:
                self._findings.append(f"{service} had {most} workers, but at most {_BOUNDS[service].most} are allowed")
        if self._fleet.history.most["denoising"] < _BOUNDS["denoising"].most:
            most = self._fleet.history.most["denoising"]
            self._findings.append(
                f"denoising had at most {most} workers, but {_DENOISERS} are expected under this load"
            )


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
    """Run once and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--requests", type=int, default=200, help="requests of the burst from zero (default: 200)")
    parser.add_argument("--scale-ins", type=int, default=100, help="scale-ins while requests run (default: 100)")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a short request (default: 4)")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="scale-"))
    report = run_autoscale(Load(args.requests, args.scale_ins, args.steps), directory)
    findings = report.history.findings
    explanation = explain_findings(report.history.notes, findings, directory) if findings else ""
    return end_run(report.table(), explanation, directory)


if __name__ == "__main__":
    sys.exit(main())
