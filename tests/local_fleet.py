"""A complete pipeline in this process: the real stages behind LocalRunners, without gRPC and Redis."""

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
class RecordedCall:
    """Warnings, progress and items that a call reported."""

    warnings: list[tuple[str, str]] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    items: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Items of directly called stages, by slot; a LocalRunner replaces `on_item`."""

    def call(self) -> Call:
        """A Call whose callbacks append to this record."""
        return Call(
            request_id="test",
            on_warning=lambda field, message: self.warnings.append((field, message)),
            on_progress=lambda step, total: self.progress.append((step, total)),
            on_item=lambda slot, _, item: self.items[slot].append(item),
        )


def joined(items: Iterable[MediaItem]) -> Media:
    """Join the items of a stream into files: bytes are concatenated, frame counts are summed."""
    files: dict[int, MediaItem] = {}
    for item in items:
        if (before := files.get(item.file_index)) is not None:
            frames = before.num_frames + item.num_frames
            item = replace(before, data=torch.cat([before.data, item.data]), num_frames=frames)
        files[item.file_index] = item
    assert all(item.file_count == len(files) for item in files.values())
    return Media(items=tuple(files[index] for index in range(len(files))))


class LocalFleet:
    """A model with all its services, which run on one thread."""

    def __init__(
        self, model: ServedModel, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self.model = model
        self._executor = ThreadPoolExecutor(1)
        device = device or torch.device("cpu")
        self.services = {
            spec.service: HostedVariants(spec.service, load_variants(model, spec, Runtime(device=device, dtype=dtype)))
            for spec in model.services
        }

    def media(
        self, recorded: RecordedCall | None = None, images: Mapping[str, bytes] = NO_IMAGES, **given: ParamValue
    ) -> Media:
        """Run one request through validation and every service."""
        validated = InputValidationStage(self.model).run(given, images)
        variant, values = validated.variant, dict(validated.artifacts)
        if images:
            files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
            values["image_inputs"] = ImageInputs(images=files)
        runners = [
            LocalRunner(self.services[spec.service].of(variant.name), self._executor) for spec in variant.services
        ]
        call = (recorded or RecordedCall()).call()
        slot = result_of(variant.services)
        outputs: dict[str, Any] = asyncio.run(run_pipeline(runners, values, call, wanted=(slot,)))
        result: Media | tuple[MediaItem, ...] = outputs[slot]
        return result if isinstance(result, Media) else joined(result)

    def tensors(
        self, recorded: RecordedCall | None = None, images: Mapping[str, bytes] = NO_IMAGES, **given: ParamValue
    ) -> dict[str, Tensor]:
        """Run one request; returns the tensors of its safetensors file, such as "latents" and "pixels"."""
        (item,) = self.media(recorded, images, **given, output_format="safetensors").items
        tensors: dict[str, Tensor] = load(item.data.numpy().tobytes())
        return tensors

    def images(self, recorded: RecordedCall | None = None, **given: ParamValue) -> list[Image.Image]:
        """Run one request; returns its images."""
        return [
            Image.open(io.BytesIO(item.data.numpy().tobytes()))
            for item in self.media(recorded, NO_IMAGES, **given).items
        ]

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown()


def open_fleet(reference: str, dtype: torch.dtype = torch.float32) -> LocalFleet:
    """A fleet for a shipped model or a checkpoint directory."""
    return LocalFleet(open_model(reference, load_registry()), dtype)


def call_of(given: dict[str, Any]) -> dict[str, Any]:
    """Convert request parameters to arguments of a Diffusers pipeline call."""
    call = {name: value for name, value in given.items() if name != "num_outputs_per_prompt"}
    if "sigmas" in call:
        call["sigmas"] = list(call["sigmas"])
    return call | {"num_images_per_prompt": given.get("num_outputs_per_prompt", 1)}


def reference_run(pipeline: Any, *, seed: int, **given: Any) -> dict[str, Tensor]:
    """Run the request on a Diffusers image or video pipeline; returns its "latents" and "pixels"."""
    results = {}
    for name, output_type in (("latents", "latent"), ("pixels", "pt")):
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.inference_mode():
            given |= {"generator": generator, "output_type": output_type, "return_dict": False}
            (results[name],) = pipeline(**given)
    return results


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """L2 norm of the difference divided by the L2 norm of the reference."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
