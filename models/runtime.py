"""The process in which a model's stages run, as opposed to the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from configs.approximation import EXACT, Approximation
from models.parallel.mesh import Axis, AxisName, WorkerMesh
from models.stages.step_memory import StepMemoryPool, cuda_capture

DEFAULT_STEP_MEMORY_BYTES = 8 << 30


def _cpu() -> torch.device:
    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, requested precision, worker group and policies of a process.

    Stages compute on `device`: they move inputs there and outputs back to the CPU. `mesh` is this rank's place in the
    worker group that denoises; None: one rank. A denoising stage sends a step checkpoint after every
    `step_checkpoint_every` steps, and when the last one is `step_checkpoint_seconds` old; 0: never. `step_memory_bytes`
    bounds CUDA graphs, their inputs, and the memory that steps update in place. `swap_experts`: of a model with several
    denoisers the device holds one at a time, and the host's memory all.
    """

    device: torch.device = field(default_factory=_cpu)
    dtype: torch.dtype = torch.float32
    mesh: WorkerMesh | None = None
    step_checkpoint_every: int = 0
    step_checkpoint_seconds: float = 0.0
    approximation: Approximation = EXACT
    step_memory_bytes: int = DEFAULT_STEP_MEMORY_BYTES
    swap_experts: bool = False

    @cached_property
    def step_memory(self) -> StepMemoryPool:
        """Step memory that all denoising stages of this runtime share; on a GPU it captures CUDA graphs."""
        return StepMemoryPool(self.step_memory_bytes, cuda_capture() if self.device.type == "cuda" else None)

    def axis(self, name: AxisName) -> Axis:
        """This rank's neighbours on an axis of the worker group."""
        return Axis() if self.mesh is None else self.mesh.axis(name)
