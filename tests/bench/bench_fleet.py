"""A fleet of separate processes for benchmarks, and a client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import grpc

from common.tether import tethered
from fleet.v1 import generation_pb2 as api
from fleet.v1 import generation_pb2_grpc

NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class RunningFleet:
    """A ready `fleet up` process. `ready_seconds` is the time from process start to its ready line."""

    endpoint: str
    ready_seconds: float
    process_id: int


@contextmanager
def running_fleet(*arguments: str, settings: Mapping[str, str] = NO_SETTINGS) -> Iterator[RunningFleet]:
    """Run `fleet up --port 0 ARGUMENTS` during the block; `settings` are environment variables.

    Raises RuntimeError if the fleet does not become ready.
    """
    command = [sys.executable, "-m", "services.cli", "up", "--port", "0", *arguments]
    environ = {**os.environ, "FLEET_REPLY_CACHE_BYTES": "0", **settings}  # every request must be computed
    with tempfile.TemporaryFile("w+") as notes:
        began = time.monotonic()
        process = subprocess.Popen(tethered(command), env=environ, stdout=subprocess.PIPE, stderr=notes, text=True)
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if words[:1] != ["ready:"]:
                notes.seek(0)
                raise RuntimeError("fleet up did not become ready:\n" + "".join(notes.readlines()[-60:]))
            yield RunningFleet(words[1], time.monotonic() - began, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@dataclass
class Timeline:
    """Timestamps of one request at its client, in seconds since the call."""

    accepted: float = 0.0
    first_progress: float = 0.0
    finished: float = 0.0
    services: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Times of the first and last progress event, by service."""
    files: list[bytes] = field(default_factory=list)
    failure: str = ""


class Caller:
    """A blocking client with one persistent connection."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def generate(self, parameters: api.GenerationParameters, model: str = "") -> Timeline:
        """Submit a request and receive its events and files in one RPC.

        Raises RuntimeError if the request does not succeed.
        """
        seen = Timeline()
        began = time.perf_counter()
        request = api.SubmitRequest(model=model, parameters=parameters)
        for reply in self._stub.Generate(api.GenerateRequest(request=request)):
            now = time.perf_counter() - began
            match reply.WhichOneof("payload"):
                case "accepted":
                    seen.accepted = now
                case "event":
                    _note(seen, reply.event, now)
                case "file":
                    seen.files.append(b"")
                case "data":
                    seen.files[-1] += reply.data
        seen.finished = time.perf_counter() - began
        if not seen.files:
            raise RuntimeError(f"the request ended without a file: {seen.failure}")
        return seen

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


def _note(seen: Timeline, event: api.Event, now: float) -> None:
    if event.HasField("progress"):
        seen.first_progress = seen.first_progress or now
        first, _ = seen.services.get(event.progress.service, (now, now))
        seen.services[event.progress.service] = (first, now)
    elif event.HasField("state_change"):
        seen.failure = event.state_change.error.message
