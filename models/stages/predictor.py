"""Guided predictions: branches are prepared once per request and predict at each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from common.artifacts import Conditioning
from common.errors import InvalidInput
from configs.pipeline_configs.base import NEGATIVE, DenoisingConfig, Keywords, Parts, Shapes, Step
from models.contracts import DenoisingInput
from models.dits.base import DiffusionTransformer, Predictions, Prepared
from models.experts import on_device
from models.layers.step_cache import StepCache
from models.parallel.collectives import all_gather, all_reduce
from models.parallel.mesh import Axis
from models.runtime import Runtime
from models.stages.step_memory import NO_FLAGS, Flags, Lease, StepInputs, StepKind, StepMemory, Tensors


@dataclass(frozen=True)
class StepCaching:
    """Settings of the step cache.

    A step reuses the cached contribution (output minus input) of all blocks but the first if the first block's
    contribution changed by less than `threshold` (relative L1). Ranks along `axes` make the same decision.
    """

    threshold: float
    axes: tuple[Axis, ...] = ()

    def new_cache(self) -> StepCache:
        """Create an empty cache for a branch."""
        return StepCache(self._sum_over_ranks)

    def _sum_over_ranks(self, sums: Tensor) -> Tensor:
        for axis in self.axes:
            if axis.size > 1:
                sums = all_reduce(sums, axis)
        return sums


class Branch:
    """One guidance branch of a request on one denoiser.

    `reused` counts the predictions that reused the cached contribution of all blocks but the first.
    """

    def __init__(self, prepared: Prepared, memory: StepMemory, threshold: float = 0.0) -> None:
        self._prepared = prepared
        self._memory = memory
        self._threshold = threshold
        self.reused = 0

    def predict(self, latents: Tensors, step: int, flags: Flags = NO_FLAGS) -> Predictions:
        """Predict at a step.

        `latents` are keyed by the denoiser's keywords; `flags` are static keywords of this call.
        """
        row, memory = self._prepared.row(step), self._memory
        if memory.cache is not None and memory.cache.is_filled:
            predictions = predict_step(memory, latents, row, StepKind(probe=True, flags=flags))
            if memory.cache.change() < self._threshold:
                self.reused += 1
                return predictions
        return predict_step(memory, latents, row, StepKind(flags=flags))


def predict_step(memory: StepMemory, latents: Tensors, row: Tensors, kind: StepKind) -> Predictions:
    """Run the denoiser at a step, eagerly or by the CUDA graph of this kind of step."""
    if memory.runs_eagerly(kind):
        predictions = memory.transformer.predict(**memory.keywords(latents, row, kind))
    else:
        predictions = memory.replay(latents, row, kind)
    if memory.cache is not None and not kind.probe:
        memory.cache.is_filled = True
    return predictions


def lease_branch(
    lease: Lease,
    role: str,
    transformer: DiffusionTransformer,
    prepared: Prepared,
    latents: Tensors,
    *,
    flags: Mapping[str, Hashable] = MappingProxyType({}),
    caching: StepCaching | None = None,
) -> Branch:
    """Create a branch with leased memory for latents of these shapes. Raises ResourceExhausted."""
    static = {**prepared.flags, **flags}
    inputs = StepInputs(latents, prepared.row(0), prepared.constants, prepared.memory, static)
    if caching is None:
        return Branch(prepared, lease(role, transformer, inputs))
    return Branch(prepared, lease(role, transformer, inputs, caching.new_cache), caching.threshold)


MakeBranch = Callable[[str, str], Branch]
"""Creates a branch from its name and its denoiser's role."""
Predict = Callable[[Branch], Parts]
"""Returns a branch's predictions by latent part."""


class Branches:
    """The guidance branches of one request on each of its denoisers.

    Rank r of the cfg axis computes branches r, r + cfg, ... of `names`; ranks exchange the predictions. Results are
    bit-identical to one rank, because branches are never batched together. If there is only one branch, all ranks
    compute it. `dtype` is the dtype of the predictions.
    """

    def __init__(
        self, names: Sequence[str], roles: Sequence[str], make: MakeBranch, cfg: Axis, dtype: torch.dtype
    ) -> None:
        self._dtype = dtype
        self._names = tuple(names)
        self._cfg = cfg
        self._is_split = cfg.size > 1 and len(names) > 1
        self._branches: dict[tuple[str, str], Branch] = {}
        for role in roles:
            for name in self._of_rank(self._names, cfg.index):
                self._branches[name, role] = make(name, role)

    def predict(self, active: Sequence[str], role: str, predict: Predict, latents: Parts) -> dict[str, Parts]:
        """Predictions of the active branches, in order, by branch name and latent part; shapes as the latents."""
        own = [predict(self._branches[name, role]) for name in self._of_rank(active, self._cfg.index)]
        if not self._is_split:
            return dict(zip(active, own, strict=True))
        owned = [self._of_rank(active, rank) for rank in range(self._cfg.size)]
        gathered: dict[str, Parts] = {}
        for position in range(max(map(len, owned))):
            sent = own[position] if position < len(own) else self._padding(latents)
            received = {part: all_gather(sent[part], self._cfg).unbind() for part in latents}
            for rank, names in enumerate(owned):
                if position < len(names):
                    gathered[names[position]] = {part: tensors[rank] for part, tensors in received.items()}
        return {name: gathered[name] for name in active}

    def _padding(self, latents: Parts) -> Parts:
        """Zeros that a rank without a branch contributes to the all-gather."""
        return {part: torch.zeros_like(each, dtype=self._dtype) for part, each in latents.items()}

    def _of_rank(self, names: Sequence[str], rank: int) -> list[str]:
        """The subset of `names` that a rank computes, in order."""
        if not self._is_split:
            return list(names)
        return [name for name in names if self._names.index(name) % self._cfg.size == rank]

    @property
    def reused(self) -> int:
        """Number of this rank's predictions that reused the cached contribution of all blocks but the first."""
        return sum(branch.reused for branch in self._branches.values())


@dataclass(frozen=True)
class LoopRequest:
    """Loop inputs of a request: `conditions` on the device, one row per output; `embeds` as received."""

    x: DenoisingInput
    embeds: Conditioning
    conditions: Parts
    shapes: Shapes
    steps: tuple[Step, ...]
    branches: tuple[str, ...]


class Predictor:
    """Prepares requests and predicts with a model's denoisers, for all denoising loops."""

    def __init__(self, config: DenoisingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._runtime = runtime
        self.transformers = {role: modules[role] for role in config.transformers}
        self.dtype = config.prediction_dtype or runtime.dtype

    def request(self, x: DenoisingInput) -> LoopRequest:
        """Create the loop request of an input. Raises InvalidInput for a keyword from both encoders."""
        embeds = merge_conditioning(x.text_conditioning, x.image_conditioning)
        given = x.image_latents.parts if x.image_latents else {}
        parts = {**x.initial_latents.parts, **given}
        return LoopRequest(
            x=x,
            embeds=embeds,
            conditions={part: self._batched(each.latents, x) for part, each in given.items()},
            shapes={part: each.raw_latent_shape for part, each in parts.items()},
            steps=steps_of(x, self._config.part_keywords),
            branches=self._config.branches_of(x.sampling, has_negative=bool(embeds.negative_prompt_embeds)),
        )

    def branches(
        self,
        request: LoopRequest,
        latents: Parts,
        steps: Sequence[Step],
        lease: Lease,
        caching: StepCaching | None = None,
    ) -> Branches:
        """Prepare the request's branches on the denoisers that `steps` use.

        `latents` are examples with the shapes of the latents in predict(). The denoiser of the last steps is prepared
        first: if experts are swapped, that denoiser is still on the device after the previous request.
        """
        roles = tuple(dict.fromkeys(self._config.expert(step) for step in reversed(steps)))
        given = self.model_input(latents, request.conditions)
        make = partial(self._branch, request, given, lease, caching)
        return Branches(request.branches, roles, make, self._runtime.axis("cfg"), self.dtype)

    def predict(
        self, request: LoopRequest, branches: Branches, latents: Parts, step: Step, flags: Flags = NO_FLAGS
    ) -> Parts:
        """Guided predictions of a step, by part. `flags` are static keywords of this step's predictions."""
        config = self._config
        given = self.model_input(latents, request.conditions)
        predict = partial(self._predict, given, latents, step, flags)
        active, role = config.active(step, request.branches, request.x.sampling), config.expert(step)
        on_device(self.transformers[role])
        predicted = branches.predict(active, role, predict, latents)
        if len(predicted) == 1:
            return predicted[active[0]]
        return config.guide(predicted, latents, step, request.x.sampling)

    def model_input(self, latents: Parts, conditions: Parts) -> dict[str, Tensor]:
        """The denoiser's latent inputs by keyword, in the weights' dtype."""
        given = self._config.model_input(latents, conditions)
        keywords = {**self._config.part_keywords, **self._config.condition_keywords}
        return {keywords[part]: each.to(self._runtime.dtype) for part, each in given.items()}

    def _predict(self, given: Mapping[str, Tensor], latents: Parts, step: Step, flags: Flags, branch: Branch) -> Parts:
        """One branch's predictions for the loop's latents, by part."""
        predictions = branch.predict(given, step.index, flags)
        keywords = self._config.part_keywords
        by_part = {part: predictions[keyword].to(self.dtype) for part, keyword in keywords.items()}
        return self._config.model_output(by_part, latents)

    def _branch(
        self,
        request: LoopRequest,
        latents: Mapping[str, Tensor],
        lease: Lease,
        caching: StepCaching | None,
        name: str,
        role: str,
    ) -> Branch:
        x, transformer = request.x, on_device(self.transformers[role])
        timesteps = self._config.prepared_timesteps(x.schedule.timesteps).to(self._runtime.device)
        batched = timesteps[:, None].expand(-1, x.sampling.num_outputs_per_prompt)
        keywords = self._keywords(request, name)
        prepared = transformer.prepare(self._config.model_timestep(batched), **keywords)
        flags = self._config.branch_flags(name, x.sampling)
        return lease_branch(lease, role, transformer, prepared, latents, flags=flags, caching=caching)

    def _keywords(self, request: LoopRequest, branch: str) -> Keywords:
        """The denoiser's keywords except latents and timesteps, batched and on the device."""
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
        """Repeat rows for each output, on the device."""
        return self._on_device(value).repeat_interleave(x.sampling.num_outputs_per_prompt, 0)

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self._runtime.device)


def steps_of(x: DenoisingInput, parts: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps of a schedule; all parts share its noise levels."""
    timesteps, sigmas = x.schedule.timesteps.tolist(), x.schedule.sigmas.tolist()
    levels = [dict.fromkeys(parts, sigma) for sigma in sigmas]
    return tuple(
        Step(index, float(timesteps[index]), levels[index], levels[index + 1])
        for index in range(x.schedule.num_inference_steps)
    )


def merge_conditioning(text: Conditioning, image: Conditioning | None) -> Conditioning:
    """Merge the conditioning of text and image encoders; a negative branch uses the same images.

    Raises InvalidInput for a keyword from both encoders.
    """
    if image is None:
        return text
    if twice := sorted(text.prompt_embeds.keys() & image.prompt_embeds.keys()):
        raise InvalidInput(
            f"image_conditioning: {twice} are also in text_conditioning; distinct keywords work",
            field="image_conditioning",
        )
    negative = text.negative_prompt_embeds
    return Conditioning(
        prompt_embeds={**text.prompt_embeds, **image.prompt_embeds},
        negative_prompt_embeds=negative and {**negative, **(image.negative_prompt_embeds or image.prompt_embeds)},
    )
