"""A whole pipeline in this process, for tests: the real stages behind LocalRunners, no gRPC, no Redis."""

from __future__ import annotations

import asyncio
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from common.artifacts import ImageInputs, Media, MediaItem, ParamValue
from common.local import LocalRunner
from common.pipeline import result_of, run_pipeline
from common.stage import Call
from common.variants import HostedVariants
from models.catalog import ServedModel, open_model
from models.loader import load_variants
from models.registry import load_registry
from models.runtime import Runtime
from models.validation import InputValidationStage

NO_IMAGES: Mapping[str, bytes] = MappingProxyType({})


@dataclass
class Heard:
    """What a call told its caller."""

    warnings: list[tuple[str, str]] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    items: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """What stages emitted, by slot, to a call without a runner."""

    def call(self) -> Call:
        """A call that tells it here."""
        return Call(
            request_id="test",
            on_warning=lambda field, message: self.warnings.append((field, message)),
            on_progress=lambda step, total: self.progress.append((step, total)),
            on_item=lambda slot, _, item: self.items[slot].append(item),
        )


def joined(items: Iterable[MediaItem]) -> Media:
    """The files of a stream: each with the bytes and the frames of all its items."""
    files: dict[int, MediaItem] = {}
    for item in items:
        if (before := files.get(item.file_index)) is not None:
            frames = before.num_frames + item.num_frames
            item = replace(before, data=torch.cat([before.data, item.data]), num_frames=frames)
        files[item.file_index] = item
    assert all(item.file_count == len(files) for item in files.values())
    return Media(items=tuple(files[index] for index in range(len(files))))


class LocalFleet:
    """A model with all its services on one thread."""

    def __init__(
        self, model: ServedModel, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self.model = model
        self._executor = ThreadPoolExecutor(1)
        place = device or torch.device("cpu")
        self.services = {
            spec.service: HostedVariants(spec.service, load_variants(model, spec, Runtime(device=place, dtype=dtype)))
            for spec in model.services
        }

    def media(self, heard: Heard | None = None, images: Mapping[str, bytes] = NO_IMAGES, **given: ParamValue) -> Media:
        """Run one request through validation and every service."""
        validated = InputValidationStage(self.model).run(given, images)
        variant, values = validated.variant, dict(validated.artifacts)
        if images:
            files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
            values["image_inputs"] = ImageInputs(images=files)
        runners = [
            LocalRunner(self.services[spec.service].of(variant.name), self._executor) for spec in variant.services
        ]
        call = (heard or Heard()).call()
        slot = result_of(variant.services)
        outputs: dict[str, Any] = asyncio.run(run_pipeline(runners, values, call, wanted=(slot,)))
        result: Media | tuple[MediaItem, ...] = outputs[slot]
        return result if isinstance(result, Media) else joined(result)

    def tensors(
        self, heard: Heard | None = None, images: Mapping[str, bytes] = NO_IMAGES, **given: ParamValue
    ) -> dict[str, Tensor]:
        """latents and pixels of one request."""
        (item,) = self.media(heard, images, **given, output_format="safetensors").items
        tensors: dict[str, Tensor] = load(item.data.numpy().tobytes())
        return tensors

    def images(self, heard: Heard | None = None, **given: ParamValue) -> list[Image.Image]:
        """The pictures of one request."""
        return [
            Image.open(io.BytesIO(item.data.numpy().tobytes())) for item in self.media(heard, NO_IMAGES, **given).items
        ]

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown()


def open_fleet(reference: str, dtype: torch.dtype = torch.float32) -> LocalFleet:
    """A fleet for a shipped model or a directory."""
    return LocalFleet(open_model(reference, load_registry()), dtype)


def call_of(given: dict[str, Any]) -> dict[str, Any]:
    """The same request as arguments of Diffusers' call."""
    call = {name: value for name, value in given.items() if name != "num_outputs_per_prompt"}
    if "sigmas" in call:
        call["sigmas"] = list(call["sigmas"])
    return call | {"num_images_per_prompt": given.get("num_outputs_per_prompt", 1)}


def reference_run(pipeline: Any, *, seed: int, **given: Any) -> dict[str, Tensor]:
    """latents and pixels that Diffusers' pipeline of images (or of videos) gives for the same request."""
    results = {}
    for name, output_type in (("latents", "latent"), ("pixels", "pt")):
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.inference_mode():
            given |= {"generator": generator, "output_type": output_type, "return_dict": False}
            (results[name],) = pipeline(**given)
    return results


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """L2 norm of the difference over that of the reference."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
