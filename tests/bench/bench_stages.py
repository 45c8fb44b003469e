"""Two stages that only move bytes, each served by its own process in the same way as real stages.

The producer creates a payload and records the time; the consumer records the time of its start. Both use the kernel's
monotonic clock, which all processes of a host share, so that the difference is the latency between stages.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from subprocess import PIPE, Popen
from typing import Any

import torch
from torch import Tensor

from common.artifacts import Conditioning, LatentPart, Latents
from common.local import HostedStages
from common.rpc.fleet_server import FleetServer, stop_signals
from common.rpc.stage_servicer import StageServicer
from common.stage import Call, Contract, PipelineStage
from common.tensors import TORCH
from models.contracts import DenoisingInput, DenoisingOutput, TextEncodingInput, TextEncodingOutput

SENT = "sent"
PAYLOAD = "payload"
ROUTE = "route"


@cache
def payload_of(size: int) -> Tensor:
    """A payload of `size` bytes, equal in every process; cached, so that its creation is not measured."""
    return torch.arange(size // 4, dtype=torch.int32)


class Producer(PipelineStage[TextEncodingInput, TextEncodingOutput]):
    """A stage that returns as many bytes as the prompt specifies."""

    def run(self, x: TextEncodingInput, call: Call) -> TextEncodingOutput:
        """Return the payload and its timestamp."""
        del call
        payload = payload_of(int(x.prompt.prompt))
        sent = torch.tensor([time.monotonic_ns()])
        return TextEncodingOutput(text_conditioning=Conditioning(prompt_embeds={PAYLOAD: payload, SENT: sent}))


class Consumer(PipelineStage[DenoisingInput, DenoisingOutput]):
    """A stage that checks a payload."""

    def run(self, x: DenoisingInput, call: Call) -> DenoisingOutput:
        """Return send and receive timestamps. Raises an error if the payload has changed."""
        del call
        here = time.monotonic_ns()
        embeds = x.text_conditioning.prompt_embeds
        payload, sent = embeds[PAYLOAD], embeds[SENT]
        if not torch.equal(payload, payload_of(payload.nbytes)):
            raise ValueError("the payload changed in transit")
        times = torch.tensor([int(sent), here])
        part = LatentPart(latents=times, raw_latent_shape=tuple(times.shape))
        return DenoisingOutput(denoised_latents=Latents(parts={ROUTE: part}))


STAGES: dict[str, type[PipelineStage[Any, Any]]] = {"text_encoding": Producer, "denoising": Consumer}


def without_optional_slots(contract: Contract) -> Contract:
    """Remove optional inputs, except the resume slot, and optional outputs from a contract."""
    return contract.reading().writing(())


@contextmanager
def serving(service: str, address: str) -> Iterator[Popen[str]]:
    """Run a process that serves the service's stage at the address, in the block."""
    process = Popen([sys.executable, __file__, service, address], stdout=PIPE, stdin=PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the {service} process did not become ready")
        yield process
    finally:
        process.terminate()
        process.wait()


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


async def _serve(service: str, address: str) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as executor:
        server = FleetServer(address)
        stage = STAGES[service]()
        stages = HostedStages(service, [stage.bind(without_optional_slots(stage.contract))])
        servicer = StageServicer(service, stages, executor, TORCH)
        server.add(servicer.methods, servicer.service_name)
        async with stop_signals() as stop:
            await server.start()
            _say_ready()
            await stop.wait()
        await server.drain(1)


def _serve_raw(path: str) -> None:
    """Baseline: a TCP server that replies to each 8-byte size with as many bytes. Its port is in the file `path`."""
    data = memoryview(bytearray(64 << 20))
    with socket.create_server(("127.0.0.1", 0)) as server:
        with open(path, "w") as file:
            file.write(str(server.getsockname()[1]))
        _say_ready()
        connection, _ = server.accept()
        with connection:
            while request := connection.recv(8, socket.MSG_WAITALL):
                connection.sendall(data[: int.from_bytes(request, "big")])


if __name__ == "__main__":
    if sys.argv[1] == "raw":
        _serve_raw(sys.argv[2])
    else:
        asyncio.run(_serve(sys.argv[1], sys.argv[2]))
