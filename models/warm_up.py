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
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from common.artifacts import (
    Canvas,
    Conditioning,
    Generator,
    LatentPart,
    Latents,
    ParamValue,
    Prompt,
    Sampling,
    Schedule,
)
from common.errors import InvalidInput
from common.stage import Call
from configs.pipeline_configs.base import DenoisingConfig, GuidanceConfig, Shapes
from configs.sample.base import SamplingParams
from models.catalog import ServedModel
from models.registry import resolve

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
        if texts and not issubclass(resolve(model.entry.pipeline_config), DenoisingConfig):
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
        config_class: type[DenoisingConfig] = resolve(self.model.entry.pipeline_config)
        config = config_class.from_checkpoint(self.model.checkpoint)
        slots = self.model.pipeline.service(_SERVICE).contract.inputs
        for params in self.sizes:
            made = _inputs(config, dtype, params.artifacts())
            yield {slot: artifact for slot, artifact in made.items() if slot in slots}


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
    config: DenoisingConfig, dtype: torch.dtype, request: Mapping[str, Prompt | Canvas | Sampling]
) -> dict[str, Any]:
    prompt, canvas, sampling = request["prompt"], request["canvas"], request["sampling"]
    assert isinstance(prompt, Prompt), "SamplingParams.artifacts() puts each in its slot"
    assert isinstance(canvas, Canvas), "SamplingParams.artifacts() puts each in its slot"
    assert isinstance(sampling, Sampling), "SamplingParams.artifacts() puts each in its slot"
    embeds = {name: _normal(shape, dtype) for name, shape in config.conditioning_shapes().items()}
    has_negative = isinstance(config, GuidanceConfig) and config.wants_negative(prompt, sampling)
    inputs: dict[str, Any] = {
        "initial_latents": _latents(config, config.raw_latent_shapes(canvas, sampling.num_outputs_per_prompt), dtype),
        "schedule": _schedule(sampling.num_inference_steps),
        "text_conditioning": Conditioning(prompt_embeds=embeds, negative_prompt_embeds=embeds if has_negative else {}),
        "sampling": sampling,
        "latents_generator": Generator(seed=sampling.seed, state=torch.Generator("cpu").get_state()),
    }
    if shapes := config.condition_shapes(canvas):
        inputs["image_latents"] = _latents(config, shapes, dtype)
    return inputs


def _latents(config: DenoisingConfig, shapes: Shapes, dtype: torch.dtype) -> Latents:
    return Latents(
        parts={
            part: LatentPart(latents=config.pack(part, _normal(shape, dtype)), raw_latent_shape=shape)
            for part, shape in shapes.items()
        }
    )


def _schedule(steps: int) -> Schedule:
    """Evenly spaced noise levels between 1 and 0: their values change no kernel."""
    sigmas = torch.linspace(1.0, 0.0, steps + 2)[1:]
    return Schedule(timesteps=1000 * sigmas[:-1], sigmas=sigmas, num_inference_steps=steps)


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=dtype)
