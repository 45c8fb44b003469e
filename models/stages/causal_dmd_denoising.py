"""The denoising loop of causal few-step models: blocks of a video, each emitted when it is finished.

A block attends to the preceding finished blocks through a KV cache in the request's step memory. After each block but
the last, a context pass runs the DiT on the block's finished latents at timestep 0; this writes the block's keys and
values to the cache. A resumed loop repeats the context passes of finished blocks, but not their denoising steps.

Sources: Self Forcing (arXiv 2506.08009), FastVideo's CausalDMDDenosingStage.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from common.artifacts import LatentPart, Latents
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import Step
from configs.pipeline_configs.dmd import CausalDmdConfig
from models.contracts import BlockDenoisingOutput, DenoisingInput
from models.runtime import Runtime
from models.schedulers.dmd import DmdSolver
from models.stages.loop_checkpoints import LoopCheckpoints
from models.stages.loop_state import LoopState
from models.stages.pacing import paced_steps
from models.stages.predictor import Branches, LoopRequest, Predictor
from models.stages.snapshots import on_cpu
from models.stages.step_memory import Flags, Lease

BLOCKS = "denoised_blocks"
FIRST_FRAME = "first_frame"
"""Static keyword of the denoiser's predict(): the number of latent frames before the block."""


class CausalDMDDenoisingStage(PipelineStage[DenoisingInput, BlockDenoisingOutput]):
    """Takes all steps of the schedule for each block in order; the KV cache belongs to the request."""

    def __init__(self, config: CausalDmdConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._runtime = runtime
        self._predictor = Predictor(config, runtime, modules)
        self._new_solver = partial(DmdSolver, config.draw_noise)
        self._memory = runtime.step_memory
        (self._part,) = config.part_keywords

    @torch.inference_mode()
    def run(self, x: DenoisingInput, call: Call) -> BlockDenoisingOutput:
        """Denoise all outputs as one batch; each item of the stream is a block of all outputs.

        Steps are counted over all blocks. Reports every step, and ends within one step when cancelled. A resumed loop
        first emits the finished blocks again, then continues after resume_from.step with identical bytes. Raises
        InvalidInput if the frames do not fill whole blocks, ResourceExhausted before the first step if step memory is
        insufficient, and HandedOver at a step boundary if requested.
        """
        blocks = self._config.blocks_of(x.initial_latents.parts[self._part].latents)
        request = self._predictor.request(x)
        state = LoopState.of(x, self._config.part_keywords, self._new_solver, blocks)
        finished = state.step // len(request.steps)
        for block in range(finished):
            self._emit(state, block, call)
        if finished < blocks:
            with self._memory.leases() as lease:
                self._loop(request, state.to(self._runtime.device), blocks, call, lease)
        else:
            call.progress(state.step, state.step)
        return BlockDenoisingOutput()

    def _loop(self, request: LoopRequest, state: LoopState, blocks: int, call: Call, lease: Lease) -> None:
        steps, total = request.steps, len(request.steps) * blocks
        latents = state.block(self._config.frames_of(0))  # only for shapes
        branches = self._predictor.branches(request, latents, steps, lease)
        checkpoints = LoopCheckpoints(state, total, self._runtime, call)
        for block in range(state.step // len(steps)):
            call.check_cancelled()
            checkpoints.hand_over_if_asked()
            self._write_context(request, branches, state, block)
        for index in paced_steps(state.step, total, call, self._runtime.device):
            checkpoints.hand_over_if_asked()
            block, number = divmod(index, len(steps))
            frames = self._config.frames_of(block)
            predictions = self._predictor.predict(
                request, branches, state.block(frames), steps[number], self._flags(block)
            )
            state.advance(predictions, frames)
            if number + 1 < len(steps):
                checkpoints.send_if_due()
                continue
            # Send the checkpoint before the block, so that the steps of a received block are never repeated.
            checkpoints.send()
            self._emit(state, block, call)
            if block + 1 < blocks:
                self._write_context(request, branches, state, block)

    def _write_context(self, request: LoopRequest, branches: Branches, state: LoopState, block: int) -> None:
        """Write a finished block to the KV cache by a prediction at timestep 0.

        The prepared row of timestep 0 follows the rows of the steps.
        """
        clean = dict.fromkeys(state.latents, 0.0)
        step = Step(len(request.steps), 0.0, clean, clean)
        latents = state.block(self._config.frames_of(block))
        self._predictor.predict(request, branches, latents, step, self._flags(block))

    def _emit(self, state: LoopState, block: int, call: Call) -> None:
        latents = {part: each.contiguous() for part, each in state.block(self._config.frames_of(block)).items()}
        parts = {
            part: LatentPart(latents=each, raw_latent_shape=tuple(each.shape)) for part, each in on_cpu(latents).items()
        }
        call.emit(BLOCKS, Latents(parts=parts), block)

    def _flags(self, block: int) -> Flags:
        return ((FIRST_FRAME, self._config.frames_of(block).start),)
