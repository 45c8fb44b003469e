"""Measured seconds per service of one request to each published model, from stage_seconds.toml."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

_FILE = "stage_seconds.toml"


@dataclass(frozen=True)
class Shape:
    """The factors of a request's work: pixels of all frames, denoising steps, branches per step."""

    pixels: int
    steps: int
    branches: int = 1


@dataclass(frozen=True)
class Measurement:
    """One model on one device. `seconds` maps services to the seconds of a request of `size` (H, W[, F])."""

    model: str
    device: str
    pipelines: tuple[str, ...]
    transformer: Mapping[str, Any]
    size: tuple[int, ...]
    steps: int
    guided: bool
    seconds: Mapping[str, float]
    proportional: Mapping[str, str]

    @property
    def shape(self) -> Shape:
        """The shape of the measured request."""
        return Shape(math.prod(self.size), self.steps, 1 + self.guided)

    def fits(self, pipeline: str, transformer: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this pipeline and transformer config has the measured architecture."""
        return pipeline in self.pipelines and all(
            transformer.get(key) == value for key, value in self.transformer.items()
        )

    def seconds_of(self, service: str, shape: Shape) -> float:
        """Seconds of a service, scaled to a shape. Raises KeyError for a service without a measurement."""
        measured, pixels = self.shape, shape.pixels / self.shape.pixels
        loop = shape.steps * shape.branches / (measured.steps * measured.branches)
        factor = {"request": 1.0, "pixel": pixels, "pixel_step": pixels * loop}[self.proportional[service]]
        return self.seconds[service] * factor


@dataclass(frozen=True)
class Transport:
    """Transport time in seconds: per request, and per hop of 4 MB through the coordinator."""

    request_seconds: float
    hop_seconds: float


@dataclass(frozen=True)
class GroupSpeed:
    """Speed-up of a denoising step by a worker group over one GPU, for one model and size."""

    model: str
    size: tuple[int, ...]
    degrees: str
    speedup: float


@cache
def group_speeds() -> Sequence[GroupSpeed]:
    """The committed speed-ups of worker groups."""
    return [GroupSpeed(**{**each, "size": tuple(each["size"])}) for each in _content()["groups"]["measured"]]


def group_device() -> str:
    """The GPU on which the speed-ups were measured."""
    return str(_content()["groups"]["device"])


@cache
def measurements() -> Mapping[str, Measurement]:
    """The committed measurements, by model name."""
    content = _content()
    return {
        model: Measurement(
            model=model,
            device=each["device"],
            pipelines=tuple(each["pipelines"]),
            transformer=each["transformer"],
            size=tuple(each["size"]),
            steps=each["steps"],
            guided=each["guided"],
            seconds=each["seconds"],
            proportional=content["proportional"],
        )
        for model, each in content["measured"].items()
    }


@cache
def transport() -> Transport:
    """The committed transport costs."""
    return Transport(**_content()["transport"])


def _content() -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath(_FILE).read_text(encoding="utf-8"))
