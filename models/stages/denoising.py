"""The denoising loop. It knows no model: what differs between models, it asks the config."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from prometheus_client import Counter
from torch import Tensor

from common.artifacts import Conditioning
from common.errors import HandedOver, InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import NEGATIVE, DenoisingConfig, Keywords, Parts, Shapes, Step
from models.composition import SCHEDULER
from models.contracts import DenoisingInput, DenoisingOutput
from models.experts import on_device
from models.runtime import Runtime
from models.schedulers.solver import solver_class
from models.stages.branches import Branch, Branches, StepCaching, lease_branch
from models.stages.loop_state import LoopState
from models.stages.pacing import paced_steps
from models.stages.step_memory import Lease

_log = logging.getLogger(__name__)

STEPS_REUSED = Counter("fleet_steps_reused", "Predictions of this rank that took most blocks' work from earlier steps")


@dataclass(frozen=True)
class _Request:
    """A request as the loop reads it: `conditions` on the device with a row for each output, `embeds` as received."""

    x: DenoisingInput
    embeds: Conditioning
    conditions: Parts
    shapes: Shapes
    steps: tuple[Step, ...]
    branches: tuple[str, ...]


class DenoisingStage(PipelineStage[DenoisingInput, DenoisingOutput]):
    """Predicts and steps until the schedule ends, with one prediction for each branch that a step needs."""

    def __init__(self, config: DenoisingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._runtime = runtime
        self._transformers = {role: modules[role] for role in config.transformers}
        self._scheduler = modules[SCHEDULER]
        self._solver_class = solver_class(self._scheduler)
        self._memory = runtime.step_memory
        self._prediction_dtype = config.prediction_dtype or runtime.dtype
        self._caching = _step_caching(runtime)

    @torch.inference_mode()
    def run(self, x: DenoisingInput, call: Call) -> DenoisingOutput:
        """Denoise all outputs as one batch.

        Reports every step, ends within one when cancelled, and continues after resume_from.step to the same bytes. In a
        worker group all ranks run it together, on equal inputs, and get equal outputs. With a step cache it neither
        sends checkpoints nor resumes nor hands over: the cache is not part of them. Raises ResourceExhausted, before
        the first step, where the memory of its steps does not fit, and HandedOver at a step boundary when asked to.
        """
        request = self._request(x)
        state = LoopState.of(x, self._config.part_keywords, partial(self._solver_class, self._scheduler))
        if self._caching is not None and state.step:
            raise InvalidInput("a loop with a step cache starts at step 0: it has no checkpoints", field="resume_from")
        with self._memory.leases() as lease:
            self._loop(request, state.to(self._runtime.device), call, lease)
        latents = self._config.after_loop(state.latents, request.conditions)
        return DenoisingOutput(denoised_latents=state.artifact({part: each.cpu() for part, each in latents.items()}))

    def _loop(self, request: _Request, state: LoopState, call: Call, lease: Lease) -> None:
        config, total = self._config, len(request.steps)
        branches = self._branches(request, state, lease)
        last_sent, first = time.monotonic(), state.step
        for index in paced_steps(first, total, call, self._runtime.device):
            if self._caching is None and call.must_hand_over():
                _hand_over(state, call, first)
            step = request.steps[index]
            state.latents = config.before_step(step, state.latents, request.conditions)
            predictions = self._predictions(request, branches, state.latents, step)
            state.advance(predictions)
            state.latents = config.after_step(step, state.latents, request.conditions)
            if self._is_checkpoint_due(state.step, total, last_sent):
                last_sent = time.monotonic()
                call.on_step_checkpoint(state.step_checkpoint())
        if self._caching is not None:
            STEPS_REUSED.inc(branches.reused)
            _log.info("reused the blocks' work of earlier steps %d times in %d steps", branches.reused, total)

    def _predictions(self, request: _Request, branches: Branches, latents: Parts, step: Step) -> Parts:
        """The guided predictions of a step, by part."""
        config = self._config
        given = self._model_input(latents, request.conditions)
        predict = partial(self._predict, given, latents, step)
        active, role = config.active(step, request.branches, request.x.sampling), config.expert(step)
        on_device(self._transformers[role])
        predicted = branches.predict(active, role, predict, latents)
        if len(predicted) == 1:
            return predicted[active[0]]
        return config.guide(predicted, latents, step, request.x.sampling)

    def _predict(self, given: Mapping[str, Tensor], latents: Parts, step: Step, branch: Branch) -> Parts:
        """One branch's predictions for the loop's latents, by part."""
        predictions = branch.predict(given, step.index)
        keywords = self._config.part_keywords
        by_part = {part: predictions[keyword].to(self._prediction_dtype) for part, keyword in keywords.items()}
        return self._config.model_output(by_part, latents)

    def _model_input(self, latents: Parts, conditions: Parts) -> dict[str, Tensor]:
        """The denoiser's latents by its keywords, in the weights' dtype."""
        given = self._config.model_input(latents, conditions)
        return {self._config.part_keywords[part]: each.to(self._runtime.dtype) for part, each in given.items()}

    def _request(self, x: DenoisingInput) -> _Request:
        embeds = merge_conditioning(x.text_conditioning, x.image_conditioning)
        given = x.image_latents.parts if x.image_latents else {}
        parts = {**x.initial_latents.parts, **given}
        return _Request(
            x=x,
            embeds=embeds,
            conditions={part: self._batched(each.latents, x) for part, each in given.items()},
            shapes={part: each.raw_latent_shape for part, each in parts.items()},
            steps=steps_of(x, self._config.part_keywords),
            branches=self._config.branches_of(x.sampling, has_negative=bool(embeds.negative_prompt_embeds)),
        )

    def _branches(self, request: _Request, state: LoopState, lease: Lease) -> Branches:
        """The branches of the request, on the denoisers that its remaining steps need.

        The last one needed is prepared first: where denoisers are swapped, an earlier request left it on the device.
        """
        steps = reversed(request.steps[state.step :])
        roles = tuple(dict.fromkeys(self._config.expert(step) for step in steps))
        latents = self._model_input(state.latents, request.conditions)  # for their shapes
        make = partial(self._branch, request, latents, lease)
        return Branches(request.branches, roles, make, self._runtime.axis("cfg"), self._prediction_dtype)

    def _branch(self, request: _Request, latents: Mapping[str, Tensor], lease: Lease, name: str, role: str) -> Branch:
        x, transformer = request.x, on_device(self._transformers[role])
        timesteps = x.schedule.timesteps.to(self._runtime.device)
        batched = timesteps[:, None].expand(-1, x.sampling.num_outputs_per_prompt)
        keywords = self._keywords(request, name)
        prepared = transformer.prepare(self._config.model_timestep(batched), **keywords)
        flags = self._config.branch_flags(name, x.sampling)
        return lease_branch(lease, role, transformer, prepared, latents, flags=flags, caching=self._caching)

    def _keywords(self, request: _Request, branch: str) -> Keywords:
        """The denoiser's keywords besides latents and timestep, batched and on the device."""
        config, embeds, sampling = self._config, request.embeds, request.x.sampling
        if branch == NEGATIVE:
            given = embeds.negative_prompt_embeds
            own = config.prepare_neg_cond_kwargs(given, request.shapes, sampling)
        else:
            given = embeds.prompt_embeds
            own = config.prepare_pos_cond_kwargs(given, request.shapes, sampling)
        batched = {name: self._batched(value, request.x) for name, value in given.items()}
        return {**batched, **{name: None if value is None else self._on_device(value) for name, value in own.items()}}

    def _batched(self, value: Tensor, x: DenoisingInput) -> Tensor:
        """A row for each output, on the device."""
        return self._on_device(value).repeat_interleave(x.sampling.num_outputs_per_prompt, 0)

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self._runtime.device)

    def _is_checkpoint_due(self, done: int, total: int, last_sent: float) -> bool:
        """Whether a checkpoint is due after `done` steps. `last_sent` is a `time.monotonic()` timestamp."""
        if self._caching is not None:
            return False
        every, seconds = self._runtime.step_checkpoint_every, self._runtime.step_checkpoint_seconds
        due = 0 < seconds <= time.monotonic() - last_sent
        return (due or (every > 0 and done % every == 0)) and done < total


def _hand_over(state: LoopState, call: Call, first: int) -> NoReturn:
    """Send a checkpoint of the steps done since step `first`, where the loop began, and end the loop."""
    if state.step > first:
        call.on_step_checkpoint(state.step_checkpoint())
    raise HandedOver(f"this worker leaves; the loop is handed over after {state.step} steps")


def steps_of(x: DenoisingInput, parts: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps of a schedule; all parts have its noise levels."""
    timesteps, sigmas = x.schedule.timesteps.tolist(), x.schedule.sigmas.tolist()
    levels = [dict.fromkeys(parts, sigma) for sigma in sigmas]
    return tuple(
        Step(index, float(timesteps[index]), levels[index], levels[index + 1])
        for index in range(x.schedule.num_inference_steps)
    )


def _step_caching(runtime: Runtime) -> StepCaching | None:
    """Ranks that hold parts of one branch decide together; branches decide separately."""
    threshold = runtime.approximation.step_cache_threshold
    if threshold <= 0:
        return None
    return StepCaching(threshold, (runtime.axis("tp"), runtime.axis("ulysses"), runtime.axis("ring")))


def merge_conditioning(text: Conditioning, image: Conditioning | None) -> Conditioning:
    """The conditioning of text and image encoders together. The negative branch, if there is one, has the same images.

    Raises InvalidInput for a keyword that both encoders made.
    """
    if image is None:
        return text
    if twice := sorted(text.prompt_embeds.keys() & image.prompt_embeds.keys()):
        raise InvalidInput(f"text and image encoders both made {twice}", field="image_conditioning")
    negative = text.negative_prompt_embeds
    return Conditioning(
        prompt_embeds={**text.prompt_embeds, **image.prompt_embeds},
        negative_prompt_embeds=negative and {**negative, **(image.negative_prompt_embeds or image.prompt_embeds)},
    )
