"""The gRPC server of a stage service: servicers, reply caches, and messages that describe the worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from common.errors import InvalidInput
from common.rpc.fleet_server import FleetServer
from common.rpc.framing import CallLimits
from common.rpc.interceptor import admit_all
from common.rpc.replies import ReplyCache
from common.rpc.stage_servicer import ServicerLimits, Stages, StageServicer
from common.rpc.tls import Mutual, NamedPeers, mutual_credentials, watch_mutual
from common.rpc.watchdog import Watchdog
from common.stage import Contract
from common.state.redis_client import Redis
from common.state.shared_replies import SharedReplies
from common.telemetry import MetricsInterceptor
from common.tensors import TORCH
from common.variants import HostedVariants
from common.watched import WatchedFiles
from fleet.v1 import worker_pb2, worker_pb2_grpc
from models.kernels.packages import TrialOutcome
from models.parallel.mesh import Degrees
from services.measured_stages import MeasuredStages
from services.worker_settings import CachingSettings, StepSettings, WorkerSettings, device_of, prepare_session_thread

_SERVICE = "fleet.v1.WorkerService"


def contract_message(contract: Contract, stages: Iterable[str] = ()) -> worker_pb2.StageContract:
    """The contract of a service as a message, for GetModelInfo and the registry."""
    return worker_pb2.StageContract(
        stages=stages,
        inputs=contract.inputs,
        outputs=contract.outputs,
        optional_inputs=sorted(contract.optional),
        optional_outputs=sorted(contract.optional_outputs),
    )


def variant_messages(contracts: Mapping[str, Contract]) -> list[worker_pb2.VariantContract]:
    """The contracts of the variants as messages, in the model's order."""
    return [
        worker_pb2.VariantContract(variant=variant, contract=contract_message(contract))
        for variant, contract in contracts.items()
    ]


def degrees_message(degrees: Degrees) -> worker_pb2.Degrees:
    """The parallel degrees of a worker group as a message."""
    return worker_pb2.Degrees(tp=degrees.tp, ulysses=degrees.ulysses, ring=degrees.ring, cfg=degrees.cfg)


def kernel_messages(outcomes: Iterable[TrialOutcome]) -> list[worker_pb2.KernelPackage]:
    """The kernel packages and the outcomes of their trials at start-up, as messages."""
    return [
        worker_pb2.KernelPackage(
            name=each.package.name,
            version=each.version,
            error=each.error,
            replacement=each.package.replacement if each.error else "",
        )
        for each in outcomes
    ]


def tls_of(settings: WorkerSettings) -> WatchedFiles[Mutual] | None:
    """Mutual TLS of a worker; None for plain text. Raises InvalidInput for missing or unusable files."""
    tls = watch_mutual(settings)
    if tls is None and settings.tls_cert is not None:
        raise InvalidInput("tls_cert is set without tls_ca, which verifies coordinators; set both", field="tls_ca")
    return tls


def watchdog_of(settings: WorkerSettings) -> Watchdog | None:
    """The watchdog of the device thread; None for a service whose stages report no steps.

    Raises InvalidInput for a bound that is not more than 0.
    """
    return Watchdog(settings.hang_limits) if isinstance(settings, StepSettings) else None


def make_server(
    service: str,
    stages: Stages,
    executor: ThreadPoolExecutor,
    info: worker_pb2.WorkerInfo,
    settings: WorkerSettings,
    tls: WatchedFiles[Mutual] | None,
    cache: ReplyCache | None,
    watchdog: Watchdog | None,
) -> tuple[FleetServer, StageServicer]:
    """Create the server of a worker, and the servicer of its stages. The caller starts the server."""
    limits = ServicerLimits(
        capacity=settings.concurrency(stages.contract),
        idle_seconds=settings.idle_seconds,
        step_seconds=settings.step_seconds if isinstance(settings, StepSettings) else 0.0,
        call=CallLimits(total_bytes=settings.max_call_bytes),
    )
    server = FleetServer(
        settings.listen,
        interceptors=[MetricsInterceptor()],
        credentials=None if tls is None else mutual_credentials(tls),
        admit=NamedPeers(settings.tls_callers) if tls else admit_all,
        health_listen=settings.health_listen,
    )
    servicer = StageServicer(
        service,
        MeasuredStages(stages, service, info.model),
        executor,
        TORCH,
        limits=limits,
        cache=cache,
        watchdog=watchdog,
        prepare_thread=partial(prepare_session_thread, device_of(settings.device), settings.threads),
        model=info.model,
    )
    server.add(servicer.methods, servicer.service_name)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(info), server.grpc_server)
    server.add(None, _SERVICE)
    return server, servicer


def cache_of(
    stages: HostedVariants, info: worker_pb2.WorkerInfo, settings: WorkerSettings, shared: SharedReplies | None
) -> ReplyCache | None:
    """The reply cache, if the settings enable it and the stages support it; else None."""
    if not isinstance(settings, CachingSettings) or settings.reply_cache_bytes <= 0 or stages.indifferent_to is None:
        return None
    return ReplyCache(
        settings.reply_cache_bytes,
        service=info.service,
        model=info.model,
        indifferent_to=stages.indifferent_to,
        shared=shared,
    )


def shared_of(redis: Redis, info: worker_pb2.WorkerInfo, settings: WorkerSettings) -> SharedReplies | None:
    """The cache shared by workers with equal weights and numerics, if the settings enable it; else None."""
    if not isinstance(settings, CachingSettings) or settings.reply_cache_redis_bytes <= 0:
        return None
    return SharedReplies(
        redis,
        service=info.service,
        model=info.model,
        origin=f"{info.model_fingerprint} {info.numerics_fingerprint}",
        max_bytes=settings.reply_cache_redis_bytes,
        keep_seconds=settings.reply_cache_redis_seconds,
        gain=settings.reply_cache_redis_gain,
    )


class WorkerService(worker_pb2_grpc.WorkerServiceServicer):
    """The RPC that describes the worker."""

    def __init__(self, info: worker_pb2.WorkerInfo) -> None:
        self._info = info

    async def GetModelInfo(  # noqa: N802 -- the name in the .proto  # type: ignore[override]
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        del request, context
        return worker_pb2.GetModelInfoResponse(worker=self._info)
