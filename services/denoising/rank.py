"""One rank of a worker group: finds the others, loads its part of the model, and serves (rank 0) or follows."""

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

# Collectives must outlast whatever one rank may do longer than another, such as warming up. Losses are noticed by the
# side channel.
_COLLECTIVE_TIMEOUT = timedelta(hours=2)


def run_rank(model: ServedModel, settings: DenoisingSettings, place: Place, warm_up: WarmUp) -> int:
    """Be that rank until the group ends; returns the exit code. Raises Unavailable when the others do not come.

    All ranks warm up together: rank 0 hands out made-up requests as it does others.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        _take_part(model, _of_rank(settings, place), place, warm_up)
    except (RuntimeError, MemoryError) as error:
        # The loss of another rank or a full device can cause it: the launcher may start the group again.
        raise Unavailable(f"rank {place.rank}: {type(error).__name__}: {error}") from error
    return 0


def _take_part(model: ServedModel, settings: DenoisingSettings, place: Place, warm_up: WarmUp) -> None:
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


def _leave(*_: object) -> NoReturn:
    """Told to end while there is nothing to finish yet: reading weights cannot be interrupted otherwise."""
    sys.stderr.flush()
    os._exit(0)


def _of_rank(settings: DenoisingSettings, place: Place) -> DenoisingSettings:
    """A GPU for each rank of the machine; on a CPU, which they share, one thread each."""
    if device_of(settings.device).type == "cuda":
        return replace(settings, device=f"cuda:{place.local_rank}")
    return replace(settings, threads=settings.threads or 1)


class _Rank:
    """What all ranks have."""

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
        """Connect the devices of all ranks, for collectives.

        Kernel packages have been tried before. Raises FailedPrecondition where the ranks' facts differ.
        """
        try:
            compare_facts(self._links, facts_of(self._settings, device), self._settings.rank_join_seconds)
        except OutOfStep as error:
            abandon(str(error))
        if self._place.num_nodes == 1 and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # Else gloo takes the address that the host's name has.
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
        """Return once all ranks have loaded: a call that came before would not end on them at the same time."""
        distributed.barrier()


class LeadingRank(_Rank):
    """Rank 0: the worker of the service, as coordinators know it."""

    _stop_serving: Callable[[], object] | None = None

    def run(self, model: ServedModel, warm_up: WarmUp) -> None:
        """Serve until told to end, here or by a follower that was told, and send the followers home."""
        self._liveness.start(on_lost=abandon, on_leaving=self._stop)
        asyncio.run(serve(SERVICE, model, self._settings, ranks=self, warm_up=warm_up))
        self._liveness.end()
        for link in self._links:
            with suppress(OutOfStep):  # It has ended by itself.
                link.send(Kind.END)

    def lead(self, stages: HostedVariants) -> LeadingStages:
        """The stages, run by all ranks."""
        return LeadingStages(SERVICE, stages, self._links, abandon)

    def on_leaving(self, stop: Callable[[], object]) -> None:
        """Have `stop` called, from another thread, when a follower has been told to end."""
        self._stop_serving = stop

    def _stop(self) -> None:
        if self._stop_serving is None:
            _leave()
        with suppress(RuntimeError):  # The event loop has ended: it has been told already.
            self._stop_serving()


class FollowingRank(_Rank):
    """Any other rank: computes with rank 0, and asks it to end the group when it is told to end itself."""

    _is_ending = False

    def run(self, model: ServedModel) -> None:
        """Follow until sent home."""
        self._liveness.start(on_lost=self._lost)
        device = device_of(self._settings.device)
        if self._place.local_rank == 0:  # Of another host than rank 0, which exports the GPUs of its own host.
            self._export_metrics(device)
        prepare_thread(device, self._settings.threads)
        try_packages(device, self._settings.kernel_choice)
        runtime = self._settings.runtime(device, dtype_of(self._settings.dtype, device), self.make_mesh(device))
        # Only rank 0 sends step checkpoints.
        runtime = replace(runtime, step_checkpoint_every=0, step_checkpoint_seconds=0.0)
        variants = load_variants(model, model.service(SERVICE), runtime)
        self.wait_for_all()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_end)
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

    def _ask_to_end(self, *_: object) -> None:
        self._is_ending = True
        self._liveness.leave()

    def _lost(self, reason: str) -> None:
        """Rank 0 may go before it has said so only where all are told to end."""
        if self._is_ending:
            _leave()
        abandon(reason)
