"""A fleet of separate services with sleeping denoisers, and the latents and solver of Wan 2.1."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
from bench_services import service

from common.state.embedded import EmbeddedStore
from fleet.v1 import generation_pb2 as api
from fleet.v1 import generation_pb2_grpc

sys.path.append(str(Path(__file__).parents[1]))  # builders of small checkpoints

from tiny_wan import build_tiny_wan

PLUGINS = Path(__file__).parent / "paced_family"


def build_checkpoint(path: Path, seconds: float) -> Path:
    """Write a small Wan directory whose transformer sleeps for `seconds` per step."""
    build_tiny_wan(path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "PacedWanPipeline"}))
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "paced_seconds": seconds}))
    return path


@contextmanager
def paced_fleet(
    directory: Path, model: Path, *denoisers: Sequence[str]
) -> Iterator[tuple[generation_pb2_grpc.GenerationServiceStub, list[Path]]]:
    """A fleet without decoders, with one denoiser per set of options. Yields a stub, and each denoiser's step log."""
    with ExitStack() as stack:
        store = stack.enter_context(EmbeddedStore(appendfsync="always"))
        shared = ("--model", f"paced={model}", "--redis", store.url, "--plugins", str(PLUGINS))
        worker = (*shared, "--device", "cpu", "--threads", "1")
        logs = []
        for number, options in enumerate(denoisers):
            listen = ("--listen", f"unix:{directory}/d{number}.sock")
            process = stack.enter_context(service("denoising", *worker, *listen, *options))
            logs.append(model / f"steps-{process.pid}")
        for name in ("text_encoding", "latent_preparation"):
            stack.enter_context(service(name, *worker, "--listen", f"unix:{directory}/{name}.sock"))
        listen_on = f"unix:{directory}/c.sock"
        stack.enter_context(service("coordinator", *shared, "--listen", listen_on))
        channel = stack.enter_context(grpc.insecure_channel(listen_on))
        yield generation_pb2_grpc.GenerationServiceStub(channel), logs


def submission(steps: int, **more: Any) -> api.SubmitRequest:
    """A request for 81 frames of 480x832 without guidance; `more` are other fields of the message."""
    parameters = api.GenerationParameters(
        prompt="a sleeping cat", height=480, width=832, num_frames=81, num_inference_steps=steps, guidance_scale=1.0
    )
    return api.SubmitRequest(parameters=parameters, **more)


def follow(stub: generation_pb2_grpc.GenerationServiceStub, request_id: str, step: int) -> None:
    """Wait until the denoiser has reported `step` or a later step, or the request has ended."""
    call = stub.Watch(api.WatchRequest(request_id=request_id))
    for reply in call:
        if reply.event.progress.service == "denoising" and reply.event.progress.step >= step:
            call.cancel()
            return


def denoise(stub: generation_pb2_grpc.GenerationServiceStub, steps: int) -> None:
    """Run one request to its last step, then cancel it, as there is no decoder."""
    request_id = stub.Submit(submission(steps)).request.request_id
    follow(stub, request_id, steps)
    stub.CancelRequest(api.CancelRequestRequest(request_id=request_id))
