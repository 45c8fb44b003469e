"""One rank of a worker group: joins the other ranks, loads its shard, and serves (rank 0) or follows."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store

from common.errors import Unavailable
from common.telemetry import start_metrics
from common.variants import HostedVariants
from models.catalog import ServedModel
from models.kernels.trials import try_packages
from models.loader import load_variants
from models.parallel.mesh import WorkerMesh, make_mesh
from models.warm_up import WarmUp
from services.denoising.facts import compare_facts, facts_of
from services.denoising.follower import Follower
from services.denoising.group import LeadingStages
from services.denoising.joining import Place, Purpose, join
from services.denoising.liveness import Liveness, abandon
from services.denoising.messages import Kind, Link, OutOfStep
from services.denoising.settings import SERVICE, DenoisingSettings
from services.gpu_metrics import export_gpus, gpu_indices
from services.worker import serve
from services.worker_settings import device_of, dtype_of, prepare_thread

# Longer than any rank waits for another rank, for example during loading. Heartbeats detect lost ranks earlier.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)


def run_rank(model: ServedModel, settings: DenoisingSettings, place: Place, warm_up: WarmUp) -> int:
    """Run one rank until the group ends; returns the exit code. Raises Unavailable if another rank does not join.

    All ranks warm up together, because rank 0 runs the synthetic requests like other requests.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    try:
        _join_and_run(model, _of_rank(settings, place), place, warm_up)
    except (RuntimeError, MemoryError) as error:
        # The cause may be temporary, such as the loss of another rank or a full device: permit a restart of the group.
        raise Unavailable(f"rank {place.rank}: {type(error).__name__}: {error}") from error
    return 0


def _join_and_run(model: ServedModel, settings: DenoisingSettings, place: Place, warm_up: WarmUp) -> None:
    store = place.store(settings.rank_join_seconds)
    connections = join(place, store, settings.rank_join_seconds)
    links = [Link(peer, each[Purpose.CONTROL]) for peer, each in sorted(connections.items())]
    heartbeats = {peer: each[Purpose.HEARTBEATS] for peer, each in connections.items()}
    liveness = Liveness(
        heartbeats, rank_heartbeat_seconds=settings.rank_heartbeat_seconds, rank_lost_seconds=settings.rank_lost_seconds
    )
    if place.rank:
        FollowingRank(place, store, settings, links, liveness).run(model)
    else:
        LeadingRank(place, store, settings, links, liveness).run(model, warm_up)
    distributed.destroy_process_group()


def _exit(*_: object) -> NoReturn:
    """Exit at once on a signal while no call runs, because loading weights cannot be interrupted."""
    sys.stderr.flush()
    os._exit(0)


def _of_rank(settings: DenoisingSettings, place: Place) -> DenoisingSettings:
    """Settings of this rank, which computes on the GPU with its local rank.

    On a CPU, a rank has one thread by default, because ranks share cores.
    """
    if device_of(settings.device).type == "cuda":
        return replace(settings, device=f"cuda:{place.local_rank}")
    return replace(settings, threads=settings.threads or 1)


class _Rank:
    """Common parts of leading and following ranks."""

    def __init__(
        self, place: Place, store: Store, settings: DenoisingSettings, links: list[Link], liveness: Liveness
    ) -> None:
        self.degrees = settings.degrees
        self.ranks_here = settings.ranks_per_node
        self.shares_memory = False
        self._place = place
        self._store = store
        self._settings = settings
        self._links = links
        self._liveness = liveness

    def make_mesh(self, device: torch.device) -> WorkerMesh:
        """Create the process group and the device mesh of all ranks.

        Call it after the kernel trials. Raises FailedPrecondition for ranks with different facts.
        """
        try:
            compare_facts(self._links, facts_of(self._settings, device), self._settings.rank_join_seconds)
        except OutOfStep as error:
            abandon(str(error))
        if self._place.num_nodes == 1 and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # By default, Gloo resolves the host name.
        cuda = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore("collectives", self._store),
            rank=self._place.rank,
            world_size=self._place.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
            device_id=device if cuda else None,
        )
        mesh = make_mesh(self.degrees, device, one_host=self._place.num_nodes == 1)
        self.shares_memory = mesh.shares_memory
        return mesh

    def wait_for_all(self) -> None:
        """Return when all ranks have loaded their shards, because ranks must start every call together."""
        distributed.barrier()


class LeadingRank(_Rank):
    """Rank 0, which is the worker that coordinators call."""

    _stop_serving: Callable[[], object] | None = None

    def run(self, model: ServedModel, warm_up: WarmUp) -> None:
        """Serve until this rank or a follower receives a stop signal, then end the followers."""
        self._liveness.start(on_lost=abandon, on_stopping=self._stop)
        asyncio.run(serve(SERVICE, model, self._settings, ranks=self, warm_up=warm_up))
        self._liveness.end()
        for link in self._links:
            with suppress(OutOfStep):  # The follower has exited already.
                link.send(Kind.END)

    def lead(self, stages: HostedVariants) -> LeadingStages:
        """Wrap stages so that each call runs on all ranks together."""
        return LeadingStages(SERVICE, stages, self._links, abandon)

    def on_stopping(self, stop: Callable[[], object]) -> None:
        """Register `stop`. Another thread calls it when a follower has received a stop signal."""
        self._stop_serving = stop

    def _stop(self) -> None:
        if self._stop_serving is None:
            _exit()
        with suppress(RuntimeError):  # The event loop has ended, because the worker is already stopping.
            self._stop_serving()


class FollowingRank(_Rank):
    """A rank other than 0, which computes in step with rank 0 and forwards stop signals to it."""

    _is_stopping = False

    def run(self, model: ServedModel) -> None:
        """Follow rank 0 until END."""
        self._liveness.start(on_lost=self._lost)
        device = device_of(self._settings.device)
        if self._place.local_rank == 0:  # One rank per host exports the metrics of its GPUs: on rank 0's host, rank 0.
            self._export_metrics(device)
        prepare_thread(device, self._settings.threads)
        try_packages(device, self._settings.kernel_choice)
        runtime = self._settings.runtime(device, dtype_of(self._settings.dtype, device), self.make_mesh(device))
        # Only rank 0 sends step checkpoints.
        runtime = replace(runtime, step_checkpoint_every=0, step_checkpoint_seconds=0.0)
        variants = load_variants(model, model.service(SERVICE), runtime)
        self.wait_for_all()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        hosted = HostedVariants(SERVICE, variants)
        try:
            Follower(SERVICE, hosted, self._links[0], total_bytes=self._settings.max_call_bytes).follow()
        except OutOfStep as error:
            self._lost(str(error))
        self._liveness.end()

    def _export_metrics(self, device: torch.device) -> None:
        if self._settings.metrics_port is not None:
            start_metrics(self._settings.metrics_port)
        export_gpus(gpu_indices(device, self.ranks_here))

    def _request_stop(self, *_: object) -> None:
        self._is_stopping = True
        self._liveness.request_stop()

    def _lost(self, reason: str) -> None:
        """Handle the loss of rank 0. During a shutdown, rank 0 may exit before it sends END."""
        if self._is_stopping:
            _exit()
        abandon(reason)
