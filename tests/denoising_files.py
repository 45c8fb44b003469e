"""The denoising stage's input as a safetensors file, to pass one input to several processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.artifacts import Conditioning, Generator, LatentPart, Latents, Sampling, Schedule
from models.contracts import DenoisingInput


def save_input(x: DenoisingInput, path: Path) -> None:
    """Write every field except resume_from to `path`."""
    shapes: dict[str, tuple[int, ...]] = {}
    tensors = {"schedule.timesteps": x.schedule.timesteps, "schedule.sigmas": x.schedule.sigmas}
    for slot, latents in (("initial_latents", x.initial_latents), ("image_latents", x.image_latents)):
        for name, part in latents.parts.items() if latents else ():
            tensors[f"{slot}.{name}"] = part.latents
            shapes[f"{slot}.{name}"] = part.raw_latent_shape
    for slot, conditioning in (
        ("text_conditioning", x.text_conditioning),
        ("image_conditioning", x.image_conditioning),
    ):
        if conditioning:
            tensors |= {f"{slot}.positive.{name}": value for name, value in conditioning.prompt_embeds.items()}
            tensors |= {f"{slot}.negative.{name}": value for name, value in conditioning.negative_prompt_embeds.items()}
    if x.latents_generator is not None:
        tensors["generator"] = x.latents_generator.state
    numbers = {"sampling": dataclasses.asdict(x.sampling), "shapes": shapes}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"numbers": json.dumps(numbers)})


def load_input(path: str | Path) -> DenoisingInput:
    """Read an input that save_input() wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        numbers = json.loads(file.metadata()["numbers"])
    timesteps = tensors["schedule.timesteps"]
    return DenoisingInput(
        initial_latents=_latents(tensors, "initial_latents", numbers["shapes"]),
        image_latents=_latents(tensors, "image_latents", numbers["shapes"])
        if _below(tensors, "image_latents")
        else None,
        schedule=Schedule(timesteps=timesteps, sigmas=tensors["schedule.sigmas"], num_inference_steps=len(timesteps)),
        text_conditioning=_conditioning(tensors, "text_conditioning"),
        image_conditioning=_conditioning(tensors, "image_conditioning")
        if _below(tensors, "image_conditioning")
        else None,
        sampling=_sampling(numbers["sampling"]),
        latents_generator=_generator(tensors, numbers["sampling"]["seed"]),
    )


def _generator(tensors: Mapping[str, Tensor], seed: int) -> Generator | None:
    return Generator(seed=seed, state=tensors["generator"]) if "generator" in tensors else None


def _sampling(values: dict[str, Any]) -> Sampling:
    """Convert from JSON, which has lists instead of tuples."""
    params = {name: tuple(each) if isinstance(each, list) else each for name, each in values["params"].items()}
    return Sampling(**values | {"sigmas": tuple(values["sigmas"]), "params": params})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
    }


def _latents(tensors: Mapping[str, Tensor], slot: str, shapes: Mapping[str, list[int]]) -> Latents:
    return Latents(
        parts={
            name: LatentPart(latents=tensor, raw_latent_shape=tuple(shapes[f"{slot}.{name}"]))
            for name, tensor in _below(tensors, slot).items()
        }
    )


def _conditioning(tensors: Mapping[str, Tensor], slot: str) -> Conditioning:
    return Conditioning(
        prompt_embeds=_below(tensors, f"{slot}.positive"), negative_prompt_embeds=_below(tensors, f"{slot}.negative")
    )
