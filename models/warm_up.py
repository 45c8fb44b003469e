"""Made-up requests that a denoising service runs before it takes real ones.

What a size needs is made when it is first asked for: Triton compiles kernels, libraries set themselves up, the second
step captures a CUDA graph. Requests of a size that was warmed up find all of that. Where texts are not padded, each
number of tokens has a graph of its own: made-up texts have one usual number.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from common.artifacts import Canvas, Conditioning, LatentPart, Latents, ParamValue, Prompt, Sampling
from common.errors import InvalidInput
from common.stage import Call
from configs.pipeline_configs.base import StandardPipelineConfig
from configs.sample.base import SamplingParams
from models.catalog import ServedModel
from models.composition import SCHEDULER
from models.contracts import LatentPreparationInput, TimestepPreparationInput
from models.loader import load_module
from models.registry import resolve
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage

STEPS = 3
"""The first readies the kernels, the second captures a graph, the third finds one."""

_FIELD = "warm_up"
_SERVICE = "denoising"
_SIZE = re.compile(r"(?P<height>[0-9]{1,5})x(?P<width>[0-9]{1,5})(x(?P<num_frames>[0-9]{1,5}))?")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """The sizes that one model's denoising is to be warm for."""

    model: ServedModel
    sizes: tuple[SamplingParams, ...]

    @classmethod
    def parse(cls, model: ServedModel, texts: Sequence[str]) -> Self:
        """Read sizes, HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES; frames that are not given are the model's own number.

        Raises InvalidInput for what is no size, for sizes that a request could not ask this model for, and for models
        whose stages are not the standard ones.
        """
        if texts and not issubclass(resolve(model.entry.pipeline_config), StandardPipelineConfig):
            message = f"{model.checkpoint.pipeline_name} cannot be warmed up: its stages are not the standard ones"
            raise InvalidInput(message, field=_FIELD)
        return cls(model, tuple(_params(model, text) for text in texts))

    def run(self, stages: Callable[[Mapping[str, Any], Call], object], dtype: torch.dtype, call: Call) -> None:
        """Run the denoising stages for a few steps at each size. `dtype` is theirs; raises as they do."""
        for params, inputs in zip(self.sizes, self.inputs(dtype), strict=True):
            began = time.monotonic()
            stages(inputs, call)
            size = "x".join(str(each) for each in params.extent.values())
            _log.info("warmed up for %s in %.1f s", size, time.monotonic() - began)

    def inputs(self, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """The artifacts of a made-up request at each size, by slot of the denoising stage, on the CPU."""
        if not self.sizes:
            return
        config_class: type[StandardPipelineConfig] = resolve(self.model.entry.pipeline_config)
        config = replace(config_class.from_checkpoint(self.model.checkpoint), dtype=dtype)
        service = self.model.pipeline.service(_SERVICE)
        scheduler = load_module(self.model.checkpoint, self.model.pipeline.roles[SCHEDULER], config)
        for params in self.sizes:
            made = _inputs(config, scheduler, params.artifacts())
            yield {slot: made[slot] for slot in service.contract.inputs if slot in made}


def _params(model: ServedModel, text: str) -> SamplingParams:
    match = _SIZE.fullmatch(text)
    if match is None:
        message = f"{text!r} is no size to warm up for; it must be HEIGHTxWIDTH, or HEIGHTxWIDTHxFRAMES of a video"
        raise InvalidInput(message, field=_FIELD)
    size = {name: int(value) for name, value in match.groupdict().items() if value is not None}
    request: dict[str, ParamValue] = {"prompt": "", "negative_prompt": "", "num_inference_steps": STEPS, "seed": 0}
    try:
        params, warnings = model.sampling_params.build({**request, **size}, model.checkpoint)
    except InvalidInput as error:
        raise InvalidInput(f"warm_up {text}: {error.message}", field=_FIELD) from error
    for warning in warnings:
        if warning.field in size:
            _log.warning("warm_up %s: %s", text, warning.message)
    return params


def _inputs(
    config: StandardPipelineConfig, scheduler: Any, request: Mapping[str, Prompt | Canvas | Sampling]
) -> dict[str, Any]:
    prompt, canvas, sampling = request["prompt"], request["canvas"], request["sampling"]
    assert isinstance(prompt, Prompt), "SamplingParams.artifacts() puts each in its slot"
    assert isinstance(canvas, Canvas), "SamplingParams.artifacts() puts each in its slot"
    assert isinstance(sampling, Sampling), "SamplingParams.artifacts() puts each in its slot"
    call = Call("warm-up")
    drawn = LatentPreparationStage(config, {}).run(LatentPreparationInput(canvas=canvas, sampling=sampling), call)
    laid_out = TimestepPreparationStage(config, {SCHEDULER: scheduler}).run(
        TimestepPreparationInput(canvas=canvas, sampling=sampling), call
    )
    embeds = {name: _normal(shape, config.dtype) for name, shape in config.conditioning_shapes().items()}
    inputs = {
        "initial_latents": drawn.initial_latents,
        "schedule": laid_out.schedule,
        "text_conditioning": Conditioning(
            prompt_embeds=embeds, negative_prompt_embeds=embeds if config.wants_negative(prompt, sampling) else {}
        ),
        "sampling": sampling,
        "latents_generator": drawn.latents_generator,
    }
    if (shape := config.condition_shape(canvas)) is not None:
        latents = config.pack(_normal(shape, config.noise_dtype))
        inputs["image_latents"] = Latents(parts={"condition": LatentPart(latents=latents, raw_latent_shape=shape)})
    return inputs


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=dtype)
