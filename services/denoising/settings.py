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
    """Serve the denoising of one model, by this process or by a worker group of tp x ulysses x ring x cfg ranks."""

    tp: int = setting(1, help="ranks among which the weights are cut (tensor parallelism)")
    ulysses: int = setting(1, help="ranks that share the sequence by exchanging attention heads")
    ring: int = setting(1, help="ranks that share the sequence by passing keys and values around")
    cfg: int = setting(1, help="ranks among which the branches of guidance are shared out, at most as many as branches")
    nnodes: int = setting(1, help="machines that the ranks are spread over, equally; each runs this command")
    node_rank: int = setting(0, help="which of the machines this is, from 0; rank 0, which serves, is on machine 0")
    rdzv_endpoint: str = setting("", help="HOST:PORT where the machines meet: an address of machine 0, and a free port")
    max_restarts: int = setting(10, help="starts of the group in a row, none of which served for a minute")
    rank_heartbeat_seconds: float = setting(1.0, help="time between two signs of life among ranks")
    rank_lost_seconds: float = setting(
        8.0, help="silence after which a rank is taken for lost, and the group starts again"
    )
    rank_join_seconds: float = setting(120.0, help="time that all ranks get to find each other at the start")
    linear_dtype: LinearDtype = setting(
        "same", help="what the transformer's large linear layers multiply in: float8 is faster, and less exact"
    )
    step_cache_threshold: float = setting(
        0.0,
        help="a step whose first block changes less than this reuses the others' work; 0: never; 0.1 is usual",
    )
    swap_experts: bool = setting(
        False, help="hold one of a model's experts on the device at a time, and all in the host's memory"
    )

    @property
    def approximation(self) -> Approximation:
        """What denoising may leave out of the exact computation."""
        return Approximation(self.linear_dtype, self.step_cache_threshold)

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The process in which the loop runs."""
        return replace(super().runtime(device, dtype, mesh), swap_experts=self.swap_experts)

    @property
    def degrees(self) -> Degrees:
        """How many ranks there are, by axis. Raises InvalidInput for numbers that cannot be."""
        return Degrees(tp=self.tp, ulysses=self.ulysses, ring=self.ring, cfg=self.cfg)

    @property
    def ranks_per_node(self) -> int:
        """Ranks on this machine."""
        return self.degrees.world_size // self.nnodes


def check_group(model: ServedModel, settings: DenoisingSettings) -> None:
    """Refuse a worker group that cannot be, before anything is started.

    Raises InvalidInput for numbers that do not fit the model or each other, FailedPrecondition for those that do not
    fit this machine.
    """
    degrees = settings.degrees
    if settings.nnodes < 1 or degrees.world_size % settings.nnodes:
        raise InvalidInput(
            f"nnodes is {settings.nnodes}, which must divide the {degrees.world_size} ranks of {degrees}",
            field="nnodes",
        )
    if not 0 <= settings.node_rank < settings.nnodes:
        raise InvalidInput(
            f"node_rank is {settings.node_rank}; of {settings.nnodes} machines it is 0 to {settings.nnodes - 1}",
            field="node_rank",
        )
    host, _, port = settings.rdzv_endpoint.rpartition(":")
    if settings.nnodes > 1 and not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise InvalidInput(
            f"{settings.nnodes} machines need --rdzv-endpoint HOST:PORT to meet, not {settings.rdzv_endpoint!r}",
            field="rdzv_endpoint",
        )
    if settings.rank_lost_seconds < 3 * settings.rank_heartbeat_seconds or settings.rank_heartbeat_seconds <= 0:
        raise InvalidInput(
            "rank_lost_seconds must be at least three times rank_heartbeat_seconds", field="rank_lost_seconds"
        )
    if settings.max_restarts < 0:
        raise InvalidInput(f"max_restarts is {settings.max_restarts}; it must be 0 or more", field="max_restarts")
    check_degrees(model, degrees)
    _check_device(settings)


def check_degrees(model: ServedModel, degrees: Degrees) -> None:
    """Refuse degrees that do not fit the model, as far as can be told without its weights. Raises InvalidInput."""
    spec = model.service(SERVICE)
    check_parallel(model, spec, degrees)
    _check_branches(model, degrees)
    for module in spec.modules:
        heads = model.checkpoint.module_config(module).get("num_attention_heads")
        if isinstance(heads, int):
            degrees.check_model(heads)


def check_attention(model: ServedModel, settings: DenoisingSettings) -> None:
    """Refuse an attention backend that does not take the model's heads in the dtype of the GPU. Raises InvalidInput."""
    device = device_of(settings.device)
    if device.type == "cuda":
        sizes = [size for module in model.service(SERVICE).modules for size in head_sizes(model, module)]
        check_choice(settings.attention_backend, dtype_of(settings.dtype, device), sizes)


def head_sizes(model: ServedModel, module: str) -> Iterator[int]:
    """Channels of the attention heads that a denoiser's config.json states."""
    config = model.checkpoint.module_config(module)
    yield from (size for name, size in config.items() if name.endswith("attention_head_dim") and isinstance(size, int))
    match config:
        case {"dim": int(width), "n_heads": int(heads)} if heads:  # Z-Image
            yield width // heads


def _check_branches(model: ServedModel, degrees: Degrees) -> None:
    """A rank of the cfg axis that has no branch to compute in any variant would do nothing. Raises InvalidInput."""
    configs = [resolve(variant.pipeline_config) for variant, _ in model.variants_of(SERVICE)]
    branches = [config.branches for config in configs if issubclass(config, DenoisingConfig)]
    most = max(branches, key=len, default=())
    if branches and degrees.cfg > len(most):
        known = f"{model.checkpoint.pipeline_name} has {len(most)} branches: {', '.join(most)}"
        raise InvalidInput(f"cfg: {degrees.cfg} is not at most {len(most)}; {known}", field="cfg")


def _check_device(settings: DenoisingSettings) -> None:
    """Each rank takes a GPU of its own, or they share the CPU."""
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InvalidInput(
            f"device is {settings.device!r}; of a worker group it must be auto, cpu or cuda: each rank takes the GPU "
            "with its number",
            field="device",
        )
    if device_of(settings.device).type == "cuda" and settings.ranks_per_node > torch.cuda.device_count():
        raise FailedPrecondition(
            f"{settings.ranks_per_node} ranks ({settings.degrees}) need a GPU each, but this machine has "
            f"{torch.cuda.device_count()}; take smaller degrees, more machines (--nnodes), or --device cpu",
            field="device",
        )
