"""Settings of the denoising service: loop settings, parallel degrees and rank supervision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from common.errors import FailedPrecondition, InvalidInput
from common.settings import setting
from configs.approximation import Approximation, LinearDtype
from configs.pipeline_configs.base import DenoisingConfig
from models.catalog import ServedModel
from models.kernels.attention_table import check_choice
from models.loader import check_parallel
from models.parallel.mesh import Degrees, WorkerMesh
from models.registry import resolve
from models.runtime import Runtime
from services.worker_settings import LoopSettings, WarmUpSettings, device_of, dtype_of

SERVICE = "denoising"


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(LoopSettings, WarmUpSettings):
    """Serve the denoising of one model, with tp x ulysses x ring x cfg ranks."""

    tp: int = setting(1, help="tensor-parallel degree: ranks that shard the weights")
    ulysses: int = setting(1, help="Ulysses degree: ranks that shard the sequence and exchange attention heads")
    ring: int = setting(1, help="ring degree: ranks that shard the sequence and pass keys and values in a ring")
    cfg: int = setting(1, help="cfg degree: ranks that shard the guidance branches; at most the number of branches")
    nnodes: int = setting(1, help="number of hosts, each with an equal number of ranks; run this command on each host")
    node_rank: int = setting(0, help="index of this host, from 0; host 0 runs rank 0, which serves requests")
    rdzv_endpoint: str = setting("", help="HOST:PORT of the rendezvous: an address and a free port of host 0")
    max_restarts: int = setting(10, help="maximum consecutive restarts, each after a run of at most a minute")
    rank_heartbeat_seconds: float = setting(1.0, help="seconds between two heartbeats of a rank")
    rank_lost_seconds: float = setting(
        8.0, help="seconds without a heartbeat after which a rank is lost, and the group restarts"
    )
    rank_join_seconds: float = setting(120.0, help="seconds for all ranks to join at the start")
    linear_dtype: LinearDtype = setting(
        "same", help="dtype of GEMMs in the transformer's large linear layers; float8 is faster, but less accurate"
    )
    step_cache_threshold: float = setting(
        0.0,
        help="relative change of the first block's contribution (output minus input) below which a step reuses the "
        "cached contribution of the other blocks; 0: never; typical: 0.1",
    )
    swap_experts: bool = setting(False, help="hold one expert at a time on the device, and all experts in host memory")

    @property
    def approximation(self) -> Approximation:
        """The approximations that the loop may use."""
        return Approximation(self.linear_dtype, self.step_cache_threshold)

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The runtime of the loop: device, dtype, mesh and the settings that stages read."""
        return replace(super().runtime(device, dtype, mesh), swap_experts=self.swap_experts)

    @property
    def degrees(self) -> Degrees:
        """The parallel degrees. Raises InvalidInput for invalid degrees."""
        return Degrees(tp=self.tp, ulysses=self.ulysses, ring=self.ring, cfg=self.cfg)

    @property
    def ranks_per_node(self) -> int:
        """Ranks on this host."""
        return self.degrees.world_size // self.nnodes


def check_group(model: ServedModel, settings: DenoisingSettings) -> None:
    """Check the settings of a worker group before its ranks start.

    Raises InvalidInput for degrees that the model does not support and for invalid settings, FailedPrecondition for
    more ranks than this host has GPUs.
    """
    degrees = settings.degrees
    if settings.nnodes < 1 or degrees.world_size % settings.nnodes:
        raise InvalidInput(
            f"nnodes: {settings.nnodes} is not a divisor of the {degrees.world_size} ranks of {degrees}; 1 works",
            field="nnodes",
        )
    if not 0 <= settings.node_rank < settings.nnodes:
        raise InvalidInput(
            f"node_rank: {settings.node_rank} is not from 0 to {settings.nnodes - 1}; 0 works",
            field="node_rank",
        )
    host, _, port = settings.rdzv_endpoint.rpartition(":")
    if settings.nnodes > 1 and not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise InvalidInput(
            f"rdzv_endpoint: {settings.rdzv_endpoint!r} is not HOST:PORT; set an address of host 0",
            field="rdzv_endpoint",
        )
    if settings.rank_lost_seconds < 3 * settings.rank_heartbeat_seconds or settings.rank_heartbeat_seconds <= 0:
        raise InvalidInput(
            f"rank_lost_seconds: {settings.rank_lost_seconds:g} is not at least three times rank_heartbeat_seconds "
            f"({settings.rank_heartbeat_seconds:g}), which must be above 0; 8 and 1 work",
            field="rank_lost_seconds",
        )
    if settings.max_restarts < 0:
        raise InvalidInput(f"max_restarts: {settings.max_restarts} is not at least 0; 10 works", field="max_restarts")
    check_degrees(model, degrees)
    _check_device(settings)


def check_degrees(model: ServedModel, degrees: Degrees) -> None:
    """Check degrees against the model, without reading its weights. Raises InvalidInput."""
    spec = model.service(SERVICE)
    check_parallel(model, spec, degrees)
    _check_branches(model, degrees)
    for module in spec.modules:
        heads = model.checkpoint.module_config(module).get("num_attention_heads")
        if isinstance(heads, int):
            degrees.check_model(heads)


def check_attention(model: ServedModel, settings: DenoisingSettings) -> None:
    """Check that the attention backend supports the model's head sizes and the dtype. Raises InvalidInput."""
    device = device_of(settings.device)
    if device.type == "cuda":
        sizes = [size for module in model.service(SERVICE).modules for size in head_sizes(model, module)]
        check_choice(settings.attention_backend, dtype_of(settings.dtype, device), sizes)


def head_sizes(model: ServedModel, module: str) -> Iterator[int]:
    """The head sizes (channels per attention head) in a denoiser's config.json."""
    config = model.checkpoint.module_config(module)
    yield from (size for name, size in config.items() if name.endswith("attention_head_dim") and isinstance(size, int))
    match config:
        case {"dim": int(width), "n_heads": int(heads)} if heads:  # Z-Image
            yield width // heads


def _check_branches(model: ServedModel, degrees: Degrees) -> None:
    """Refuse a cfg degree above the largest number of branches of a variant. Raises InvalidInput."""
    configs = [resolve(variant.pipeline_config) for variant, _ in model.variants_of(SERVICE)]
    branches = [config.branches for config in configs if issubclass(config, DenoisingConfig)]
    most = max(branches, key=len, default=())
    if branches and degrees.cfg > len(most):
        known = f"{model.checkpoint.pipeline_name} has {len(most)} branches: {', '.join(most)}"
        raise InvalidInput(f"cfg: {degrees.cfg} is not at most {len(most)}; {known}", field="cfg")


def _check_device(settings: DenoisingSettings) -> None:
    """Check that each rank can have its own GPU, unless all ranks use the CPU.

    Raises InvalidInput for another device, FailedPrecondition for too few GPUs.
    """
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InvalidInput(
            f"device: {settings.device!r} is not auto, cpu or cuda, which a worker group needs; auto works, and each "
            "rank uses the GPU with its local rank",
            field="device",
        )
    if device_of(settings.device).type == "cuda" and settings.ranks_per_node > torch.cuda.device_count():
        raise FailedPrecondition(
            f"{settings.ranks_per_node} ranks ({settings.degrees}) need one GPU each, but this host has "
            f"{torch.cuda.device_count()}; use smaller degrees, more hosts (--nnodes), or --device cpu",
            field="device",
        )
