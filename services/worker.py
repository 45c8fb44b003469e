"""What the stage services share: load a model's stages, serve them, announce them, and leave without losing a call."""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from redis.asyncio import Redis

from common.errors import FailedPrecondition, FleetError, InvalidInput, Unavailable
from common.local import HostedStages
from common.pipeline import PipelineError, ServiceSpec
from common.rpc.address import advertised_address
from common.rpc.framing import Limits
from common.rpc.interceptor import admit_all
from common.rpc.replies import ReplyCache
from common.rpc.server import ServingLimits, Stages, StageServicer
from common.rpc.serving import FleetServer, stop_signals
from common.rpc.tls import Mutual, NamedPeers, Shown, TlsSettings, server_credentials, watch_mutual
from common.settings import load_settings, setting
from common.stage import Call, Contract
from common.state.connection import connect
from common.state.shared_replies import SharedReplies
from common.state.workers import WorkerRegistry
from common.telemetry import MetricsInterceptor, setup_logging, stage_timer, start_metrics
from common.tensors import TORCH
from common.watched import WatchedFiles
from configs.approximation import EXACT, Approximation
from fleet.v1 import worker_pb2, worker_pb2_grpc
from models.catalog import ServedModel, open_model
from models.layers.mesh import Degrees, WorkerMesh
from models.loader import load_stages, numerics_fingerprint
from models.registry import load_registry
from models.warm_up import WarmUp

log = logging.getLogger(__name__)

_SERVICE = "fleet.v1.WorkerService"
_PACKAGES = ("diffusion-fleet", "torch", "diffusers", "transformers")
_ANNOUNCE_AGAIN_SECONDS = 1.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(TlsSettings):
    """Serve one stage service of one model."""

    model: str = setting(help="what to serve: a Diffusers directory, NAME=DIR, or the name of a shipped model")
    redis: str = setting(help="URL of the request store, to announce this worker in")
    listen: str = setting("127.0.0.1:0", help="address to listen on: HOST:PORT (port 0: a free one), or unix:PATH")
    advertise: str = setting("", help="address under which coordinators reach this worker, where it is not --listen")
    device: str = setting("auto", help="where to compute: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", help="what to compute in; auto is bfloat16 on CUDA and float32 elsewhere"
    )
    threads: int = setting(0, help="CPU threads that an operation may use; 0 leaves that to torch")
    capacity: int = setting(1, help="requests taken at a time; they compute one after the other")
    checkpoint_every: int = setting(0, help="denoising steps between two checkpoints to resume from; 0: by time only")
    checkpoint_seconds: float = setting(5.0, help="longest time between two of them; 0: by steps only")
    kernel_cache: Path | None = setting(None, help="directory that keeps compiled kernels from one start to the next")
    plugins: tuple[Path, ...] = setting((), help="directories with pipelines of other families")
    grace_seconds: float = setting(30.0, help="time that running calls get to finish after SIGTERM")
    announce_seconds: float = setting(60.0, help="how long to wait for the request store at the start")
    idle_seconds: float = setting(30.0, help="give up on a caller that is silent for so long within its inputs")
    step_seconds: float = setting(0.25, help="shortest time between two steps that a call tells its caller of")
    max_call_bytes: int = setting(2 << 30, help="most bytes of tensors that a call may carry")
    tls_callers: tuple[str, ...] = setting(("coordinator",), help="names in the certificates of those who may call")
    cache_bytes: int = setting(256 << 20, help="memory for replies of text_encoding, given again to the same inputs")
    cache_redis_bytes: int = setting(0, help="memory of the request store to share them in with other workers; 0: none")
    cache_redis_seconds: float = setting(3_600.0, help="how long a shared one is kept after its last use")
    cache_redis_gain: float = setting(
        2.0, help="share what takes so many times longer to compute than to fetch, as measured; 0 shares all"
    )
    metrics_port: int | None = setting(None, help="port for Prometheus metrics; without one there are none")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="least severe log lines to write")
    log_format: Literal["text", "json"] = setting("text", help="form of log lines")

    @property
    def approximation(self) -> Approximation:
        """What the stages may leave out of the exact computation: nothing, but in denoising."""
        return EXACT


class Ranks(Protocol):
    """The worker group that a worker leads, as services.denoising makes one."""

    degrees: Degrees

    def make_mesh(self, device: torch.device) -> WorkerMesh:
        """This rank's place among the others; all ranks make theirs together. Called on the device's thread."""

    def lead(self, stages: HostedStages) -> Stages:
        """The same stages, run by all ranks together."""

    def on_leaving(self, stop: Callable[[], object]) -> None:
        """Have `stop` called, from any thread, when another rank has been told to end."""


class Worker:
    """A running worker. `stop` is its only way to end: it takes itself off the list first."""

    def __init__(self, info: worker_pb2.WorkerInfo, server: FleetServer, registry: WorkerRegistry) -> None:
        self.info = info
        self._server = server
        self._registry = registry
        self._resources = AsyncExitStack()

    @property
    def address(self) -> str:
        """Where coordinators call it."""
        return self.info.address

    @property
    def health_address(self) -> str:
        """Where probes ask for its health, if that is elsewhere."""
        return self._server.health_address

    async def stop(self, grace: float) -> None:
        """Withdraw, let running calls finish within `grace` seconds, free everything."""
        try:
            await self._registry.withdraw(self.info.worker_id)
        except Unavailable as error:
            log.warning("left without telling the request store: %s", error)
        await self._server.drain(grace)
        await self._resources.aclose()

    def keep(self, resources: AsyncExitStack) -> Worker:
        """Take over what must live as long as the worker."""
        self._resources = resources.pop_all()
        return self


async def start_worker(
    service: str,
    model: ServedModel,
    settings: WorkerSettings,
    *,
    ranks: Ranks | None = None,
    warm_up: WarmUp | None = None,
) -> Worker:
    """Load, warm up, serve, announce; returns once coordinators can find the worker.

    With `ranks` it leads a worker group. Raises CheckpointError for a model that cannot be loaded, FailedPrecondition
    where device, address or fleet do not fit, Unavailable when the request store stays away.
    """
    spec = service_of(model, service)
    tls = _tls_of(settings)
    device = device_of(settings.device)
    dtype = dtype_of(settings.dtype, device)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as resources:
        prepare = partial(prepare_thread, device, settings.threads)
        executor = ThreadPoolExecutor(1, thread_name_prefix=f"{service}-device", initializer=prepare)
        # Waits for a stage that still computes: it ends within a step, and its callbacks need this loop.
        resources.push_async_callback(asyncio.to_thread, executor.shutdown, cancel_futures=True)
        hosted = await loop.run_in_executor(executor, _load, model, spec, settings, device, dtype, ranks)
        degrees = ranks.degrees if ranks else None
        facts = (device, dtype, degrees, settings.approximation)
        numerics = await loop.run_in_executor(executor, numerics_fingerprint, *facts)
        info = worker_pb2.WorkerInfo(
            worker_id=f"{service}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
            service=service,
            model=model.name,
            pipeline_name=model.checkpoint.pipeline_name,
            model_fingerprint=model.checkpoint.fingerprint,
            numerics_fingerprint=numerics,
            contract=_contract_message(hosted.contract, spec),
            capacity=settings.capacity,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            degrees=_degrees_message(ranks.degrees) if ranks else None,
        )
        stages = ranks.lead(hosted) if ranks else hosted
        if warm_up is not None:
            await _warm_up(warm_up, stages, dtype, executor)
        redis = connect(settings.redis)
        resources.push_async_callback(redis.aclose)
        shared = _shared_of(redis, info, settings)
        if shared is not None:
            resources.push_async_callback(shared.close)
        cache = _cache_of(hosted, info, settings, shared)
        server = _make_server(service, stages, executor, info, settings, tls, cache)
        bound = await server.start()
        resources.push_async_callback(server.drain, 0)
        info.address = settings.advertise or advertised_address(bound, settings.redis)
        if settings.metrics_port is not None:
            resources.callback(start_metrics(settings.metrics_port).stop)
        registry = WorkerRegistry(redis)
        await _announce(registry, info, settings.announce_seconds)
        await server.set_ready(True)
        log.info("serves %s of %s at %s in %s on %s", service, model.name, info.address, info.dtype, info.device)
        return Worker(info, server, registry).keep(resources)


def _load(
    model: ServedModel,
    spec: ServiceSpec,
    settings: WorkerSettings,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None,
) -> HostedStages:
    """Load the service's stages: on the device's thread, and with all ranks of a worker group together."""
    stages = load_stages(
        model,
        spec,
        device=device,
        dtype=dtype,
        checkpoint_every=settings.checkpoint_every,
        checkpoint_seconds=settings.checkpoint_seconds,
        mesh=ranks.make_mesh(device) if ranks else None,
        approximation=settings.approximation,
    )
    return HostedStages(spec.service, stages, timed=partial(stage_timer, spec.service, model.name))


async def _warm_up(warm_up: WarmUp, stages: Stages, dtype: torch.dtype, executor: ThreadPoolExecutor) -> None:
    """Run made-up requests on the device's thread, and in a worker group on all ranks. A cancel ends it in a step."""
    call = Call("warm-up")
    try:
        await asyncio.get_running_loop().run_in_executor(executor, warm_up.run, stages.run, dtype, call)
    except asyncio.CancelledError:
        call.cancelled.set()
        raise


def service_of(model: ServedModel, service: str) -> ServiceSpec:
    """A service of the model's pipeline. Raises InvalidInput when it has none of that name."""
    try:
        return model.pipeline.service(service)
    except PipelineError as error:
        raise InvalidInput(str(error), field="service") from error


def _tls_of(settings: WorkerSettings) -> WatchedFiles[Mutual] | None:
    """A worker's TLS is always mutual: it serves coordinators only. Raises InvalidInput for half of it."""
    tls = watch_mutual(settings)
    if tls is None and settings.tls_cert is not None:
        raise InvalidInput("tls_cert is set without tls_ca, by which a worker knows coordinators", field="tls_ca")
    return tls


def device_of(name: str) -> torch.device:
    """The device of a setting, on CUDA with its number. Raises FailedPrecondition when this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", field="device") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", field="device")
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise FailedPrecondition(f"device {name} is not here: this machine has {count} CUDA devices", field="device")
    return torch.device("cuda", index)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The element type of a setting on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def prepare_thread(device: torch.device, threads: int) -> None:
    """Make the thread that computes this device's."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _contract_message(contract: Contract, spec: ServiceSpec) -> worker_pb2.StageContract:
    return worker_pb2.StageContract(
        stages=[stage.contract.name for stage in spec.stages],
        inputs=contract.inputs,
        outputs=contract.outputs,
        optional_inputs=sorted(contract.optional),
    )


def _degrees_message(degrees: Degrees) -> worker_pb2.Degrees:
    return worker_pb2.Degrees(tp=degrees.tp, ulysses=degrees.ulysses, ring=degrees.ring, cfg=degrees.cfg)


def _make_server(
    service: str,
    stages: Stages,
    executor: ThreadPoolExecutor,
    info: worker_pb2.WorkerInfo,
    settings: WorkerSettings,
    tls: WatchedFiles[Mutual] | None,
    cache: ReplyCache | None,
) -> FleetServer:
    limits = ServingLimits(
        capacity=settings.capacity,
        idle_seconds=settings.idle_seconds,
        step_seconds=settings.step_seconds,
        call=Limits(total_bytes=settings.max_call_bytes),
    )
    server = FleetServer(
        settings.listen,
        interceptors=[MetricsInterceptor(service)],
        credentials=None if tls is None else server_credentials(partial(_shown, tls)),
        admit=NamedPeers(settings.tls_callers) if tls else admit_all,
        health_listen=settings.health_listen,
    )
    servicer = StageServicer(service, stages, executor, TORCH, limits=limits, cache=cache)
    server.add(servicer.methods, servicer.service_name)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(info), server.grpc_server)
    server.add(None, _SERVICE)
    return server


def _shown(tls: WatchedFiles[Mutual]) -> tuple[int, Shown]:
    version, mutual = tls.versioned()
    return version, mutual.shown()


def _cache_of(
    stages: HostedStages, info: worker_pb2.WorkerInfo, settings: WorkerSettings, shared: SharedReplies | None
) -> ReplyCache | None:
    """Where replies are kept, if settings and stages both want it."""
    if stages.indifferent_to is None or settings.cache_bytes <= 0:
        return None
    return ReplyCache(
        settings.cache_bytes,
        service=info.service,
        model=info.model,
        indifferent_to=stages.indifferent_to,
        shared=shared,
    )


def _shared_of(redis: Redis, info: worker_pb2.WorkerInfo, settings: WorkerSettings) -> SharedReplies | None:
    """Where replies are shared, if that is wanted: among workers with equal weights and equal numerics."""
    if settings.cache_redis_bytes <= 0:
        return None
    return SharedReplies(
        redis,
        service=info.service,
        model=info.model,
        origin=f"{info.model_fingerprint} {info.numerics_fingerprint}",
        max_bytes=settings.cache_redis_bytes,
        keep_seconds=settings.cache_redis_seconds,
        gain=settings.cache_redis_gain,
    )


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """Tells who asks what the worker is."""

    def __init__(self, info: worker_pb2.WorkerInfo) -> None:
        self._info = info

    async def GetModelInfo(  # noqa: N802 -- the name in the .proto  # type: ignore[override]
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        del request, context
        return worker_pb2.GetModelInfoResponse(worker=self._info)


async def _announce(registry: WorkerRegistry, info: worker_pb2.WorkerInfo, patience: float) -> None:
    """Announce the worker, as soon as the store answers: services start in any order."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + patience
    while True:
        try:
            return await registry.announce(info)
        except Unavailable as error:
            if loop.time() >= give_up:
                raise
            log.warning("waiting for the request store: %s", error)
        await asyncio.sleep(_ANNOUNCE_AGAIN_SECONDS)


Settings = TypeVar("Settings", bound=WorkerSettings)


def main_for(service: str) -> Callable[[Sequence[str] | None], int]:
    """The main() of a stage service. It returns 0 after a graceful end, 2 for wrong settings, 1 for the rest."""

    def run(model: ServedModel, settings: WorkerSettings, _: Sequence[str]) -> int:
        asyncio.run(serve(service, model, settings))
        return 0

    def main(argv: Sequence[str] | None = None) -> int:
        return run_service(service, WorkerSettings, run, argv)

    return main


def run_service(
    service: str,
    settings_class: type[Settings],
    run: Callable[[ServedModel, Settings, Sequence[str]], int],
    argv: Sequence[str] | None,
) -> int:
    """Read settings, open the model, and `run` with both and the flags, for the exit code; an error is one line.

    Settings and surroundings that are wrong give exit code 2, other errors 1.
    """
    prog = f"fleet serve {service}"
    flags = sys.argv[1:] if argv is None else argv
    try:
        settings = load_settings(settings_class, flags, prog=prog)
        setup_logging(service, level=settings.log_level, form=settings.log_format)
        _keep_kernels(settings.kernel_cache)
        return run(open_model(settings.model, load_registry(settings.plugins)), settings, flags)
    except FleetError as error:
        sys.stderr.write(f"{prog}: {error.message}\n")
        return 2 if isinstance(error, (InvalidInput, FailedPrecondition)) else 1


def _keep_kernels(directory: Path | None) -> None:
    """Have Triton, which is imported with the first kernel, keep what it compiles there.

    Raises FailedPrecondition for a directory that cannot be written to.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        message = f"kernel_cache {directory} cannot be written to: {error.strerror}"
        raise FailedPrecondition(message, field="kernel_cache") from error
    os.environ["TRITON_CACHE_DIR"] = str(directory)


async def serve(
    service: str,
    model: ServedModel,
    settings: WorkerSettings,
    *,
    ranks: Ranks | None = None,
    warm_up: WarmUp | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, and then finish what runs. Raises as start_worker()."""
    async with stop_signals() as stop:
        if ranks is not None:
            loop = asyncio.get_running_loop()
            ranks.on_leaving(partial(loop.call_soon_threadsafe, stop.set))
        starting = asyncio.create_task(start_worker(service, model, settings, ranks=ranks, warm_up=warm_up))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            _leave_loading()
        worker = starting.result()
        await stopping
        log.info("draining")
        await worker.stop(settings.grace_seconds)
        # Or the interpreter's last collection walks every object of torch and transformers: a second for nothing.
        gc.freeze()


def _leave_loading() -> None:
    """End the process at once: a thread that reads weights cannot be interrupted, and nobody waits for its result."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)
