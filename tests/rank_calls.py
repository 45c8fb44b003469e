"""Functions that a rank of the pool can run. The first argument is the rank; results must be JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

# Imported before the ranks are forked, so that no rank imports these schedulers to load a stage.
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from common.checkpoint import Checkpoint
from common.stage import Call
from configs.approximation import Approximation
from configs.pipeline_configs.base import PipelineConfig
from denoising_files import load_input
from models.catalog import open_model
from models.contracts import DenoisingOutput
from models.kernels.trials import try_packages
from models.loader import load_module, load_stages
from models.parallel.collectives import gather_chunks
from models.parallel.mesh import AXES, Degrees, WorkerMesh, make_mesh
from models.parallel.segment_lengths import SegmentScope
from models.parallel.sharded_keys import ShardedKeysAttention
from models.parallel.usp_attention import USPAttention
from models.registry import load_registry, resolve
from models.runtime import Runtime
from models.stages.causal_dmd_denoising import BLOCKS, CausalDMDDenoisingStage
from models.stages.denoising import DenoisingStage

CPU = torch.device("cpu")


NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Rank:
    """State of this rank: the mesh of its current worker group, and its device."""

    mesh: WorkerMesh | None = None
    device: torch.device = CPU


RANK = Rank()


def join(rank: int, degrees: dict[str, int], store: str, kind: str = "cpu") -> dict[str, int]:
    """Form a worker group on "cpu" or "cuda" devices; returns this rank's index on each axis."""
    layout = Degrees(**degrees)
    cuda = kind == "cuda"
    RANK.device = torch.device(kind, rank) if cuda else CPU
    if cuda:
        torch.cuda.set_device(RANK.device)
        try_packages(RANK.device)
    if layout.world_size > 1:
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=layout.world_size,
            timeout=timedelta(seconds=60),
            device_id=RANK.device if cuda else None,
        )
    RANK.mesh = make_mesh(layout, RANK.device, one_host=True)
    return {axis: RANK.mesh.index(axis) for axis in AXES}


def leave(rank: int) -> None:  # noqa: ARG001  (every function takes the rank)
    """Destroy the process group. NCCL blocks until all ranks have called leave()."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def open_with(checkpoint: str, config: str) -> tuple[Checkpoint, Any]:
    """Open a checkpoint and its config. `config` is a "module:Class" reference; empty: the registered class."""
    reference = config or open_model(checkpoint, load_registry()).variants[0].pipeline_config
    config_class: type[PipelineConfig] = resolve(reference)
    opened = Checkpoint.open(Path(checkpoint))
    return opened, config_class.from_checkpoint(opened)


def forward(rank: int, checkpoint: str, inputs: str, output: str, compiled: bool = False, config: str = "") -> None:
    """Run the transformer once. With `compiled`, each block is compiled as one graph, including its collectives."""
    opened, made = open_with(checkpoint, config)
    runtime = Runtime(mesh=RANK.mesh, device=RANK.device)
    transformer = load_module(opened, "transformer", made, runtime)
    for blocks in transformer.children():
        for block in blocks if compiled and isinstance(blocks, nn.ModuleList) else ():
            block.compile(fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        prediction = transformer(**load_file(inputs, device=str(RANK.device)))
    predictions = prediction if isinstance(prediction, tuple) else (prediction,)
    save_file({"prediction": _joined([each.cpu() for each in predictions])}, rank_file(output, rank))


def denoise(
    rank: int, checkpoint: str, inputs: str, output: str, approximation: Mapping[str, Any] = NONE, config: str = ""
) -> list[int]:
    """Run the whole loop; returns the reported steps."""
    steps: list[int] = []
    blocks: list[Tensor] = []

    def on_item(slot: str, index: int, item: Any) -> None:
        if slot == BLOCKS:
            assert index == len(blocks)
            blocks.append(item.parts["video"].latents)

    runtime = Runtime(device=RANK.device, mesh=RANK.mesh, approximation=Approximation(**approximation))
    stage = denoising_stage(checkpoint, config, runtime)
    call = Call("test", on_progress=lambda step, _: steps.append(step), on_item=on_item)
    done = stage.run(load_input(inputs), call)
    if isinstance(done, DenoisingOutput):
        latents = [part.latents.cpu() for part in done.denoised_latents.parts.values()]
    else:
        latents = [torch.cat(blocks, dim=2)]
    save_file({"latents": _joined(latents)}, rank_file(output, rank))
    return steps


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The only part, or all parts flattened and concatenated."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def denoising_stage(checkpoint: str, config: str, runtime: Runtime) -> DenoisingStage | CausalDMDDenoisingStage:
    """The denoising stage of the registered pipeline, with the registered config or another config."""
    if config:
        opened, made = open_with(checkpoint, config)
        modules = {name: load_module(opened, name, made, runtime) for name in ("transformer", "scheduler")}
        return DenoisingStage(made, runtime, modules)
    model = open_model(checkpoint, load_registry())
    (stage,) = load_stages(model, model.service("denoising"), runtime)
    assert isinstance(stage, DenoisingStage | CausalDMDDenoisingStage)
    return stage


def attend(rank: int, inputs: str, output: str) -> list[int]:
    """Run USPAttention on the segments "text" and "image"; returns this rank's token counts.

    Each segment is q, k and v: (3, B, tokens, H, K).
    """
    assert RANK.mesh is not None
    mesh, segments = RANK.mesh, load_file(inputs)
    scope = SegmentScope(mesh.degrees.sp, mesh.sp_index)
    with scope.entered({name: each.shape[2] for name, each in segments.items()}) as lengths:
        local = torch.cat([lengths.local(segments[name], 2, name) for name in ("text", "image")], dim=2)
        attended = USPAttention(mesh, scope)(*local.unbind())
    sizes = [lengths.of(name)[mesh.sp_index] for name in ("text", "image")]
    text, image = (part.contiguous() for part in attended.split(sizes, dim=1))
    save_file({"text": text, "image": image}, rank_file(output, rank))
    return sizes


def attend_whole(rank: int, inputs: str, output: str) -> int:
    """Run ShardedKeysAttention; returns the token count of this rank's shard of keys and values.

    All ranks have all queries (B, T, H, K). Keys and values are (2, B, S, H, K) before sharding.
    """
    given = load_file(inputs)
    assert RANK.mesh is not None
    scope = SegmentScope(RANK.mesh.degrees.sp, RANK.mesh.sp_index)
    with scope.entered({"keys": given["key_values"].shape[2]}) as lengths:
        k, v = lengths.local(given["key_values"], 2, "keys").unbind()
        attended = ShardedKeysAttention(RANK.mesh, scope)(given["queries"], k, v)
    save_file({"attended": attended}, rank_file(output, rank))
    return k.shape[1]


def gather(rank: int, sizes: list[int]) -> list[float]:
    """Gather chunks of these sizes on the tp axis; each chunk is filled with its rank."""
    assert RANK.mesh is not None
    axis = RANK.mesh.axis("tp")
    return gather_chunks(torch.full((2, sizes[axis.index]), float(rank)), 1, sizes, axis)[0].tolist()


def rank_file(output: str, rank: int) -> Path:
    """File to which a rank writes its tensors."""
    return Path(f"{output}-{rank}.safetensors")
