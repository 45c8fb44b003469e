"""Process-level configuration of a model's stages: device, dtype, worker group, memory limits."""

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
    """Device, requested dtype, worker group, checkpoint intervals and memory bounds of a process.

    Stages move their inputs to `device` and their outputs back to the CPU. `mesh` is the device mesh of the denoising
    worker group; None: one rank. A denoising stage sends a step checkpoint every `step_checkpoint_every` steps, and
    `step_checkpoint_seconds` after the last checkpoint; 0 disables the respective interval. A causal loop also sends
    a step checkpoint after each block. `step_memory_bytes` bounds CUDA graphs, their inputs, step caches, and the
    memory that steps update in place. `swap_experts`: host memory holds all denoisers of a model, and the device holds
    one at a time.
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
        """Step memory shared by all denoising stages of this runtime; on a GPU it captures CUDA graphs."""
        return StepMemoryPool(self.step_memory_bytes, cuda_capture() if self.device.type == "cuda" else None)

    def axis(self, name: AxisName) -> Axis:
        """This rank's position on an axis of the worker mesh. Without a mesh, the axis has one rank."""
        return Axis() if self.mesh is None else self.mesh.axis(name)
