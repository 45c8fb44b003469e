"""Sampling parameters of the toy family: defaults, an additional parameter, and rounding of sizes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from configs.sample.base import ParamWarning, SamplingParams, parameter


@dataclass(frozen=True, kw_only=True)
class ToySamplingParams(SamplingParams):
    """Parameters whose height and width are multiples of the checkpoint's cell."""

    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    contrast: float = parameter("Strength of the noise in the image.", 1.0, minimum=0.0, maximum=4.0)

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """Return a size of four cells per side."""
        side = 4 * _cell(checkpoint)
        return {"height": side, "width": side}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round to whole cells."""
        del given
        return self.floored_size(_cell(checkpoint))


def _cell(checkpoint: Checkpoint) -> int:
    return int(checkpoint.module_config("transformer")["cell"])
