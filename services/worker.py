"""The worker of a stage service: loads, serves and announces stages, until a graceful stop."""

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
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from common.errors import FailedPrecondition, Unavailable
from common.log_context import log_scope
from common.logs import get_logger, setup_logging
from common.package_guard import WORKER_PACKAGES, check_private_api, check_versions
from common.pipeline import ServiceSpec
from common.rpc.address import advertised_address
from common.rpc.fleet_server import FleetServer, stop_signals
from common.rpc.grpcio_patch import GRPCIO, check_server
from common.rpc.method import begun_frame, response_type, stage_method
from common.rpc.stage_servicer import Stages, StageServicer
from common.rpc.watchdog import Watchdog
from common.settings import load_settings
from common.stage import Call
from common.state.connection import connect
from common.state.redis_client import Redis
from common.state.workers import WorkerRegistry
from common.telemetry import in_current_context, stage_timer, start_metrics
from common.tracing import exporting, traced_stage
from common.variants import HostedVariants
from fleet.v1 import worker_pb2
from models.catalog import ServedModel, open_model
from models.kernels.packages import outcomes
from models.kernels.trials import try_packages
from models.loader import load_variants, numerics_fingerprint
from models.parallel.mesh import Degrees, WorkerMesh
from models.private_operators import GEMM
from models.registry import load_registry
from models.warm_up import WarmUp
from services.gpu_metrics import export_gpus, gpu_indices
from services.leaving import leave
from services.setting_readers import READERS
from services.start_up import run_program
from services.worker_server import (
    cache_of,
    contract_message,
    degrees_message,
    kernel_messages,
    make_server,
    shared_of,
    tls_of,
    variant_messages,
    watchdog_of,
)
from services.worker_settings import (
    KernelSettings,
    WarmUpSettings,
    WorkerSettings,
    device_of,
    dtype_of,
    prepare_thread,
)

_log = get_logger(__name__)

_PACKAGES = ("diffusion-fleet", "torch", "diffusers", "transformers")
_ANNOUNCE_AGAIN_SECONDS = 1.0
_CHECK_SECONDS = 3.0
"""Timeout, in seconds, of the store check before loading. After a timeout, the check is repeated before announcing."""


class Ranks(Protocol):
    """The worker group that a worker leads, implemented by services.denoising."""

    degrees: Degrees
    ranks_here: int
    """Number of ranks on this host. Each rank has its own GPU, unless the ranks use the CPU."""
    shares_memory: bool
    """Whether ranks write to each other's memory; set by make_mesh()."""

    def make_mesh(self, device: torch.device) -> WorkerMesh:
        """Create this rank's mesh, together with all other ranks. Called on the device's thread."""

    def wait_for_all(self) -> None:
        """Return once all ranks have loaded their shards. Called on the device's thread."""

    def lead(self, stages: HostedVariants) -> Stages:
        """Wrap stages so that each call runs on all ranks together."""

    def on_stopping(self, stop: Callable[[], object]) -> None:
        """Register `stop`. Another thread calls it when another rank has received a stop signal."""


class Worker:
    """A running worker. End it with stop(), which first withdraws it from the registry."""

    def __init__(
        self, info: worker_pb2.WorkerInfo, server: FleetServer, servicer: StageServicer, registry: WorkerRegistry
    ) -> None:
        self.info = info
        self._server = server
        self._servicer = servicer
        self._registry = registry
        self._resources = AsyncExitStack()

    @property
    def address(self) -> str:
        """The address for coordinators."""
        return self.info.address

    @property
    def health_address(self) -> str:
        """The address for health probes; empty if they use `address`."""
        return self._server.health_address

    async def stop(self, grace: float) -> None:
        """Withdraw the worker, end or hand over its calls within `grace` seconds, release all resources."""
        await leave(self.info, self._registry, self._server, self._servicer, grace)
        await self._resources.aclose()

    def own(self, resources: AsyncExitStack) -> Worker:
        """Take ownership of resources, which stop() releases."""
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
    """Load, warm up, serve and announce a worker; returns once coordinators can find it.

    With `ranks`, the worker leads a worker group. Raises CheckpointError for a model that cannot be loaded,
    FailedPrecondition for an unsuitable device, address or fleet, and Unavailable if the request store does not become
    available.
    """
    await check_server()
    spec = model.service(service)
    tls = tls_of(settings)
    watchdog = watchdog_of(settings)
    checked = await _is_store_checked(settings)
    device = device_of(settings.device)
    dtype = dtype_of(settings.dtype, device)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as resources:
        resources.enter_context(exporting(service))
        if settings.metrics_port is not None:  # Before weights are loaded, because the port may be in use.
            resources.callback(start_metrics(settings.metrics_port).stop)
        prepare = partial(prepare_thread, device, settings.threads)
        executor = ThreadPoolExecutor(1, thread_name_prefix=f"{service}-device", initializer=prepare)
        # On another thread, because shutdown() waits up to a step for a running stage, which needs this event loop.
        resources.push_async_callback(asyncio.to_thread, executor.shutdown, cancel_futures=True)
        hosted = await loop.run_in_executor(executor, _load, model, spec, settings, device, dtype, ranks)
        degrees = ranks.degrees if ranks else None
        shares_memory = ranks is not None and ranks.shares_memory
        fingerprint = partial(
            numerics_fingerprint,
            *(device, dtype, degrees, settings.runtime(device, dtype).approximation),
            uses_kernels=settings.kernel_choice is not None,
            shares_memory=shares_memory,
            plugins=settings.plugins,
        )
        numerics = await loop.run_in_executor(executor, fingerprint)
        export_gpus(gpu_indices(device, ranks.ranks_here if ranks else 1))
        info = worker_pb2.WorkerInfo(
            worker_id=f"{service}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
            service=service,
            model=model.name,
            pipeline_name=model.checkpoint.pipeline_name,
            model_fingerprint=model.checkpoint.fingerprint,
            numerics_fingerprint=numerics,
            contract=contract_message(hosted.contract, dict.fromkeys(stage.contract.name for stage in spec.stages)),
            variant_contracts=variant_messages(hosted.contracts),
            capacity=settings.concurrency(hosted.contract),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            degrees=degrees_message(ranks.degrees) if ranks else None,
            reports_begun=begun_frame(response_type(stage_method(service))) is not None,
            kernels=kernel_messages(outcomes() if settings.kernel_choice else ()),
        )
        stages = ranks.lead(hosted) if ranks else hosted
        if warm_up is not None:
            await _warm_up(warm_up, stages, dtype, executor)
        redis = connect(settings.redis)
        resources.push_async_callback(redis.aclose)
        shared = shared_of(redis, info, settings)
        if shared is not None:
            resources.push_async_callback(shared.close)
        cache = cache_of(hosted, info, settings, shared)
        server, servicer = make_server(service, stages, executor, info, settings, tls, cache, watchdog)
        resources.push_async_callback(asyncio.to_thread, servicer.close)
        bound = await server.start()
        resources.push_async_callback(server.drain, 0)
        info.address = settings.advertise or advertised_address(bound, settings.redis)
        registry = WorkerRegistry(redis)
        await _announce(registry, info, watchdog, settings, None if checked else redis)
        await server.set_ready(True)
        _log_serving(info, shares_memory=shares_memory)
        return Worker(info, server, servicer, registry).own(resources)


def _log_serving(info: worker_pb2.WorkerInfo, *, shares_memory: bool) -> None:
    """Log that coordinators can find the worker. `shares_memory`: the ranks write to each other's memory."""
    _log.info(
        "serves",
        stage=info.service,
        model=info.model,
        address=info.address,
        dtype=info.dtype,
        device=info.device,
        worker=info.worker_id,
        shares_memory=shares_memory or None,
    )


def _load(
    model: ServedModel,
    spec: ServiceSpec,
    settings: WorkerSettings,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks | None,
) -> HostedVariants:
    """Load the service's stages on the device's thread; in a worker group, on all ranks together."""
    if (choice := settings.kernel_choice) is not None:
        try_packages(device, choice)
    mesh = ranks.make_mesh(device) if ranks else None
    variants = load_variants(model, spec, settings.runtime(device, dtype, mesh))
    if ranks:
        ranks.wait_for_all()

    def timed(stage: str) -> AbstractContextManager[None]:
        return traced_stage(stage_timer(spec.service, model.name, stage), stage)

    return HostedVariants(spec.service, variants, timed=timed)


async def _warm_up(warm_up: WarmUp, stages: Stages, dtype: torch.dtype, executor: ThreadPoolExecutor) -> None:
    """Run synthetic requests on the device's thread; in a worker group, on all ranks. Can be cancelled at each step."""
    call = Call("warm-up")
    try:
        with log_scope(request_id=call.request_id, model=warm_up.model.name, stage=warm_up.service):
            work = in_current_context(partial(warm_up.run, stages.run, dtype, call))
        await asyncio.get_running_loop().run_in_executor(executor, work)
    except asyncio.CancelledError:
        call.cancelled.set()
        raise


async def _is_store_checked(settings: WorkerSettings) -> bool:
    """Check the store before weights are loaded. Returns False if it is unavailable. Raises FailedPrecondition."""
    redis = connect(settings.redis)
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            await settings.check_store(redis)
    except (Unavailable, TimeoutError):
        return False
    finally:
        await redis.aclose()
    return True


async def _announce(
    registry: WorkerRegistry,
    info: worker_pb2.WorkerInfo,
    watchdog: Watchdog | None,
    settings: WorkerSettings,
    unchecked: Redis | None,
) -> None:
    """Announce the worker. Waits up to `announce_seconds` for the store, because services start in any order.

    Checks the store first if `unchecked` is set. While the device hangs, the worker sends no heartbeats, so that
    coordinators count its calls as lost.
    """
    loop = asyncio.get_running_loop()
    give_up = loop.time() + settings.announce_seconds
    while True:
        try:
            if unchecked is not None:
                await settings.check_store(unchecked)
                unchecked = None
            return await registry.announce(info, is_able=lambda: watchdog is None or not watchdog.is_stuck)
        except Unavailable as error:
            if loop.time() >= give_up:
                raise
            _log.warning("waiting for the request store", error=error)
        await asyncio.sleep(_ANNOUNCE_AGAIN_SECONDS)


Settings = TypeVar("Settings", bound=WorkerSettings)


def main_for(service: str, settings_class: type[Settings]) -> Callable[[Sequence[str] | None], int]:
    """The main() of a stage service. Exit code 0 after a graceful stop, 2 for a wrong configuration, else 1."""

    def run(model: ServedModel, settings: Settings, _: Sequence[str]) -> int:
        warm_up = None
        if isinstance(settings, WarmUpSettings):
            warm_up = WarmUp.parse(model, settings.warm_up, service=service)
        asyncio.run(serve(service, model, settings, warm_up=warm_up))
        return 0

    def main(argv: Sequence[str] | None = None) -> int:
        return run_service(service, settings_class, run, argv)

    return main


def run_service(
    service: str,
    settings_class: type[Settings],
    run: Callable[[ServedModel, Settings, Sequence[str]], int],
    argv: Sequence[str] | None,
) -> int:
    """Read the settings, open the model, and call `run` with model, settings and flags. Returns the exit code.

    A wrong configuration or environment gives exit code 2, other errors 1. Each error is one line on stderr.
    """
    prog = f"fleet serve {service}"
    flags = sys.argv[1:] if argv is None else argv

    def program() -> int:
        check_versions(*WORKER_PACKAGES)
        for api in (GRPCIO, GEMM):
            check_private_api(api)
        settings = load_settings(settings_class, flags, prog=prog, readers=READERS)
        setup_logging(service, level=settings.log_level, form=settings.log_format)
        _ = settings.kernel_choice  # Raises InvalidInput for contradictory settings.
        if isinstance(settings, KernelSettings):
            _set_kernel_cache(settings.kernel_cache)
        return run(open_model(settings.model, load_registry(settings.plugins)), settings, flags)

    return run_program(prog, program, flags)


def _set_kernel_cache(directory: Path | None) -> None:
    """Set the cache directory of Triton, QuACK and FlashAttention-4, which are imported later.

    Raises FailedPrecondition for a directory that is not writable.
    """
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        message = f"kernel_cache: {directory} is not writable: {error.strerror}"
        raise FailedPrecondition(message, field="kernel_cache") from error
    os.environ["TRITON_CACHE_DIR"] = str(directory)
    os.environ["QUACK_CACHE_DIR"] = str(directory / "quack")
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] = str(directory / "flash_attn")


async def serve(
    service: str,
    model: ServedModel,
    settings: WorkerSettings,
    *,
    ranks: Ranks | None = None,
    warm_up: WarmUp | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop. Raises the errors of start_worker()."""
    async with stop_signals() as stop:
        if ranks is not None:
            loop = asyncio.get_running_loop()
            ranks.on_stopping(partial(loop.call_soon_threadsafe, stop.set))
        starting = asyncio.create_task(start_worker(service, model, settings, ranks=ranks, warm_up=warm_up))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            _exit_while_loading()
        worker = starting.result()
        await stopping
        _log.info("draining", grace_seconds=settings.grace_seconds)
        await worker.stop(settings.grace_seconds)
        # The final garbage collection takes a second with torch and transformers; this exempts all objects from it.
        gc.freeze()


def _exit_while_loading() -> None:
    """End the process at once, because a thread that loads weights cannot be interrupted."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)
