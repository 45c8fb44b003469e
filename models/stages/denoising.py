"""The standard denoising loop; callbacks of the model's config provide everything model-specific."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from common.errors import InvalidInput
from common.logs import get_logger
from common.metrics import STEPS_REUSED
from common.stage import Call, PipelineStage
from common.streams import densified
from configs.pipeline_configs.base import DenoisingConfig
from models.composition import SCHEDULER
from models.contracts import DenoisingInput, DenoisingOutput
from models.runtime import Runtime
from models.schedulers.solver import NewSolver, solver_class
from models.stages.loop_checkpoints import LoopCheckpoints
from models.stages.loop_state import LoopState
from models.stages.pacing import paced_steps
from models.stages.predictor import LoopRequest, Predictor, StepCaching
from models.stages.step_memory import Lease

_log = get_logger(__name__)


class DenoisingStage(PipelineStage[DenoisingInput, DenoisingOutput]):
    """Takes all steps of the schedule, each with one prediction per active guidance branch."""

    def __init__(self, config: DenoisingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._runtime = runtime
        self._predictor = Predictor(config, runtime, modules)
        self._new_solver = self._solver_of(modules)
        self._memory = runtime.step_memory
        self._caching = _step_caching(runtime)

    def _solver_of(self, modules: Mapping[str, Any]) -> NewSolver:
        """Return the factory of a latent part's solver, for the checkpoint's scheduler. Raises CheckpointError."""
        scheduler = modules[SCHEDULER]
        return partial(solver_class(scheduler), scheduler)

    @torch.inference_mode()
    def run(self, x: DenoisingInput, call: Call) -> DenoisingOutput:
        """Denoise all outputs as one batch.

        Reports every step, ends within one step when cancelled, and resumes after resume_from.step with identical
        bytes. In a worker group, all ranks call run() together with equal inputs and get equal outputs. A loop with a
        step cache sends no step checkpoints, cannot resume and is not handed over, because step checkpoints do not
        contain the cache. Raises ResourceExhausted before the first step if step memory is insufficient, and HandedOver
        at a step boundary if requested.
        """
        request = self._predictor.request(x)
        state = LoopState.of(x, self._config.part_keywords, self._new_solver)
        if self._caching is not None and state.step:
            raise InvalidInput(
                f"resume_from: step {state.step} is not usable, as a loop with a step cache has no step checkpoints; "
                "a request from step 0 works",
                field="resume_from",
            )
        with self._memory.leases() as lease:
            self._loop(request, state.to(self._runtime.device), call, lease)
        latents = self._config.after_loop(state.latents, request.conditions)
        denoised = state.artifact({part: each.cpu() for part, each in latents.items()})
        if not self.writes("denoising_generator"):
            return DenoisingOutput(denoised_latents=denoised)
        return DenoisingOutput(denoised_latents=denoised, denoising_generator=state.generator_artifact())

    def _loop(self, request: LoopRequest, state: LoopState, call: Call, lease: Lease) -> None:
        config, total = self._config, len(request.steps)
        left = request.steps[state.step :]
        branches = self._predictor.branches(request, state.latents, left, lease, self._caching)
        checkpoints = LoopCheckpoints(state, total, self._runtime, call) if self._caching is None else None
        for index in paced_steps(state.step, total, call, self._runtime.device):
            if checkpoints is not None:
                checkpoints.hand_over_if_asked()
            step = request.steps[index]
            # Contiguous, as after a resume: input strides select kernels, and different kernels round differently.
            state.latents = densified(config.before_step(step, state.latents, request.conditions))
            predictions = self._predictor.predict(request, branches, state.latents, step)
            state.advance(predictions)
            state.latents = config.after_step(step, state.latents, request.conditions)
            if checkpoints is not None:
                checkpoints.send_if_due()
        if self._caching is not None:
            STEPS_REUSED.inc(branches.reused)
            _log.info("cached block contributions reused", reused=branches.reused, steps=total)


def _step_caching(runtime: Runtime) -> StepCaching | None:
    """Step caching of this runtime. Ranks that compute the same branch make the same decision."""
    threshold = runtime.approximation.step_cache_threshold
    if threshold <= 0:
        return None
    return StepCaching(threshold, (runtime.axis("tp"), runtime.axis("ulysses"), runtime.axis("ring")))
