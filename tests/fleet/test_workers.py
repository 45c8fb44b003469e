"""Life of workers, in this process and as processes: load, announce, serve and drain."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from async_tests import run_bounded, wait_until
from common.artifacts import Media
from common.codec import pack, unpack
from common.errors import FailedPrecondition, FleetError, InvalidInput, Unavailable
from common.local import HostedStages, LocalRunner
from common.pipeline import run_pipeline
from common.rpc.client import RemoteRunner, get_model_info, header_frame, open_channel
from common.rpc.framing import Packet, chunk_frames
from common.stage import Call
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from common.tensors import TORCH
from fleet.v1 import denoising_pb2
from kernel_modules import fresh_imports
from models.catalog import ServedModel, open_model
from models.kernels.packages import PACKAGES, KernelChoice, TrialOutcome, record
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.validation import InputValidationStage
from services.cli.serve import settings_class
from services.worker import main_for, start_worker
from services.worker_settings import KernelSettings, WorkerSettings
from stage_server import METHOD
from toy_checkpoint import build_toy_checkpoint, toy_family


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as directory:
        yield directory


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, plugins: Path) -> ServedModel:
    path = build_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    return open_model(f"toy={path}", load_registry([plugins]))


def settings_of(store: str, **more: Any) -> WorkerSettings:
    given: dict[str, Any] = {"model": "toy", "redis": store, "threads": 1, "device": "cpu"} | more
    return WorkerSettings(**given)


def local_media(model: ServedModel, values: dict[str, Any]) -> Media:
    """Run the request on local stages, without RPC."""

    async def main() -> Media:
        with ThreadPoolExecutor(1) as executor:
            runners = [
                LocalRunner(
                    HostedStages(
                        spec.service, load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.float32))
                    ),
                    executor,
                )
                for spec in model.services
            ]
            outputs = await run_pipeline(runners, values, Call("local"), wanted=("media",))
        media: Media = outputs["media"]
        return media

    return asyncio.run(main())


def test_plugin_family_on_workers_equals_local_stages(toy: ServedModel, store_url: str) -> None:
    values = InputValidationStage(toy).run({"prompt": "x" * 80, "seed": 7, "output_format": "safetensors"}).artifacts
    expected = local_media(toy, dict(values))

    async def test() -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(fresh_imports())
            record(KernelChoice(), [TrialOutcome(PACKAGES[0], "3.6.0")])
            registry = WorkerRegistry(await stack.enter_async_context(connect(store_url)))
            runners = []
            for spec in toy.services:
                settings = settings_class(spec.service)(model="toy", redis=store_url, threads=1, device="cpu")
                worker = await start_worker(spec.service, toy, settings)
                stack.push_async_callback(worker.stop, 5)
                (live,) = await registry.live("toy", spec.service)
                assert live == worker.info
                uses_kernels = isinstance(settings, KernelSettings)
                assert [each.name for each in live.kernels] == (["triton"] if uses_kernels else [])
                channel = await stack.enter_async_context(open_channel(live.address))
                assert await get_model_info(channel) == worker.info
                assert await health(channel, f"fleet.v1.{grpc_service_of(spec.service)}") == 1
                runners.append(RemoteRunner(channel, spec.service, spec.contract))
            warnings: list[tuple[str, str]] = []
            call = Call("r1", on_warning=lambda field, text: warnings.append((field, text)))
            packets = {slot: pack(slot, artifact) for slot, artifact in values.items()}
            outputs = await run_pipeline(runners, packets, call, wanted=("media",))
            media = unpack("media", Media, outputs["media"], TORCH)
            assert [field for field, _ in warnings] == ["prompt"]
            for ours, theirs in zip(media.items, expected.items, strict=True):
                assert torch.equal(ours.data, theirs.data)
        async with connect(store_url) as redis:
            assert not await WorkerRegistry(redis).live("toy", "denoising")

    run_bounded(test)


def grpc_service_of(service: str) -> str:
    """Name of the gRPC service, such as DenoisingService."""
    return service.title().replace("_", "") + "Service"


async def health(channel: grpc.aio.Channel, service: str) -> int:
    check: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    reply = await check(health_pb2.HealthCheckRequest(service=service).SerializeToString())
    return int(reply.status)


def test_worker_info_has_its_settings_and_reflection_lists_its_services(
    toy: ServedModel, store_url: str, tmp_path: Path
) -> None:
    async def test() -> None:
        options = {"listen": f"unix:{tmp_path}/w.sock", "dtype": "bfloat16", "capacity": 3, "metrics_port": 0}
        worker = await start_worker("denoising", toy, settings_of(store_url, **options))
        info = worker.info
        assert (info.service, info.model, info.pipeline_name) == ("denoising", "toy", "ToyPipeline")
        assert (info.address, info.dtype, info.device, info.capacity) == (options["listen"], "bfloat16", "cpu", 3)
        assert info.model_fingerprint == toy.checkpoint.fingerprint
        assert info.numerics_fingerprint
        assert info.versions["torch"] == version("torch")
        assert dict(info.contract.inputs)["initial_latents"] == "Latents"
        assert "resume_from" in info.contract.optional_inputs
        async with open_channel(worker.address) as channel:
            listed: Any = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            async for reply in listed(iter([reflection_pb2.ServerReflectionRequest(list_services="")])):
                names = {service.name for service in reply.list_services_response.service}
                assert {"fleet.v1.DenoisingService", "fleet.v1.WorkerService", "grpc.health.v1.Health"} <= names
        await worker.stop(5)

    run_bounded(test)


@pytest.mark.parametrize(
    ("service", "more", "expected", "message"),
    [
        ("image_encoding", {}, InvalidInput, "has no image_encoding service; it has text_encoding"),
        ("denoising", {"device": "cuda:99"}, FailedPrecondition, "device: cuda:99 is not available"),
        ("denoising", {"device": "meta"}, InvalidInput, "device: 'meta'"),
        ("denoising", {"device": "gpu"}, InvalidInput, "is not auto, cpu, cuda or cuda:N"),
        ("denoising", {"listen": "nowhere"}, FailedPrecondition, "cannot listen on nowhere"),
        ("denoising", {"redis": "unix:///nowhere", "announce_seconds": 0.0}, Unavailable, "is unavailable"),
        ("denoising", {"redis": "http://x"}, InvalidInput, "is not a Redis URL"),
    ],
)
def test_invalid_settings_start_no_worker(
    toy: ServedModel, store_url: str, service: str, more: dict[str, Any], expected: type[FleetError], message: str
) -> None:
    async def test() -> None:
        with pytest.raises(expected, match=message):
            await start_worker(service, toy, settings_of(store_url, **more))

    run_bounded(test)


def test_another_model_under_the_same_name_is_refused(
    toy: ServedModel, store_url: str, plugins: Path, tmp_path: Path
) -> None:
    other = open_model(f"toy={build_toy_checkpoint(tmp_path, seed=1)}", load_registry([plugins]))

    async def test() -> None:
        worker = await start_worker("decoding", toy, settings_of(store_url))
        with pytest.raises(FailedPrecondition, match="fingerprint"):
            await start_worker("decoding", other, settings_of(store_url))
        await worker.stop(5)

    run_bounded(test)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--nonsense"], 2, "--nonsense"),
        ([], 2, "--redis is missing"),
        (["--model", "no-such-model", "--redis", "unix:///x"], 2, "neither a directory nor a shipped model"),
        (["--model", "emoji", "--redis", "unix:///x", "--device", "gpu"], 2, "is not auto, cpu, cuda or cuda:N"),
    ],
)
def test_invalid_settings_of_a_service_are_reported_in_one_line(
    argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)
    assert main_for("denoising", WorkerSettings)(argv) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fleet serve denoising: ")
    assert error.count("\n") == 1


def denoise_inputs(model: ServedModel) -> dict[str, Packet]:
    """Input packets of the denoising service, computed without RPC."""
    values = dict(InputValidationStage(model).run({"prompt": "x", "seed": 1}).artifacts)
    for spec in model.services:
        if spec.service == "denoising":
            return {slot: pack(slot, values[slot], TORCH) for slot in spec.contract.inputs if slot in values}
        stages = load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.float32))
        values |= HostedStages(spec.service, stages).run(values, Call("x"))
    raise AssertionError("no denoising service")


def test_sigterm_finishes_calls_withdraws_and_exits_with_0(
    toy: ServedModel, store_url: str, plugins: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "w.sock"
    flags = {"model": f"toy={toy.checkpoint.path}", "redis": store_url, "plugins": plugins, "listen": f"unix:{socket}"}
    arguments = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    inputs = denoise_inputs(toy)
    header = header_frame(denoising_pb2.DenoiseRequest, inputs)
    rest = [frame for packet in inputs.values() for frame in chunk_frames(packet.chunks)]

    async def test() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.denoising", *arguments, "--threads", "1", stderr=asyncio.subprocess.PIPE
        )
        try:
            async with connect(store_url) as redis, open_channel(f"unix:{socket}") as channel:
                registry = WorkerRegistry(redis)

                async def announced() -> bool:
                    assert process.returncode is None
                    return bool(await registry.live("toy", "denoising"))

                async def withdrawn() -> bool:
                    return not await announced()

                async def refuses() -> bool:
                    try:
                        await get_model_info(channel)
                    except Unavailable:
                        return True
                    return False

                await wait_until(announced)
                call: Any = channel.stream_stream(METHOD)()
                await call.write(header)
                info = await get_model_info(channel)  # the worker replies after it has read the call's header
                process.send_signal(signal.SIGTERM)
                await wait_until(withdrawn)
                left = await redis.pttl(f"fleet:leaving:{info.worker_id}")
                assert 30_000 < left <= 36_000  # grace period and heartbeat TTL in ms
                assert info.reports_begun
                await wait_until(refuses)
                for frame in rest:
                    await call.write(frame)
                await call.done_writing()
                frames = [denoising_pb2.DenoiseResponse.FromString(raw) async for raw in call]
                assert frames[-1].WhichOneof("frame") in ("header", "chunk")
                assert await process.wait() == 0
            assert not socket.exists()
            assert process.stderr is not None
            assert b"Traceback" not in await process.stderr.read()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    run_bounded(test)


def test_sigterm_without_the_store_exits_with_0(toy: ServedModel, plugins: Path, tmp_path: Path) -> None:
    socket = tmp_path / "w.sock"
    flags = {"model": f"toy={toy.checkpoint.path}", "redis": "unix:///nowhere", "plugins": plugins}
    flags["listen"] = f"unix:{socket}"
    arguments = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]

    async def test() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.cli",
            "serve",
            "decoding",
            *arguments,
            "--threads",
            "1",
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stderr is not None
            async for line in process.stderr:
                if b"waiting for the request store" in line:
                    break
            assert socket.exists()
            process.terminate()
            assert await process.wait() == 0
            assert not socket.exists()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    run_bounded(test)
