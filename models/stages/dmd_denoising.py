"""The denoising loop of few-step models: each step predicts clean latents and adds new noise."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from configs.pipeline_configs.dmd import DmdConfig
from models.runtime import Runtime
from models.schedulers.dmd import DmdSolver
from models.schedulers.solver import NewSolver
from models.stages.denoising import DenoisingStage


class DmdDenoisingStage(DenoisingStage):
    """The standard loop with the DMD solver. The pipeline has no scheduler, and reads `latents_generator`."""

    _config: DmdConfig

    def __init__(self, config: DmdConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        super().__init__(config, runtime, modules)

    def _solver_of(self, modules: Mapping[str, Any]) -> NewSolver:
        del modules
        return partial(DmdSolver, self._config.draw_noise)
