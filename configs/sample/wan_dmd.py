"""Sampling parameters of few-step Wan models, with FastVideo's published defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.models.dits.causal_wan import CausalWanTransformerConfig
from configs.sample.base import ParamWarning, parameter
from configs.sample.wan import WanSamplingParams, temporal_factor

_TI2V_FRAME_RATE = 24.0


@dataclass(frozen=True, kw_only=True)
class WanDMDSamplingParams(WanSamplingParams):
    """FastWan: three steps of the flow schedule with shift 8, without guidance.

    A checkpoint's sampling_defaults.json can set other steps: TurboWan was distilled at 988, 932, 852 and 608.
    """

    supported_version: ClassVar[str] = "a few-step Wan with one transformer"
    other_versions: ClassVar[Mapping[str, str]] = {"boundary_ratio": "two transformers"}

    num_inference_steps: int = 3
    guidance_scale: float = parameter(
        "Always 1, as the model was distilled with guidance.", 1.0, minimum=1.0, maximum=1.0
    )
    dmd_denoising_steps: tuple[float, ...] = parameter(
        "Timesteps of the distillation, whole numbers from high to low; sets the number of steps.",
        (1000.0, 757.0, 522.0),
        minimum=1.0,
        maximum=1000.0,
    )
    flow_shift: float = parameter("Shift of the flow schedule's noise levels.", 8.0, minimum=0.01, maximum=100.0)

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """24 frames per second for Wan 2.2 TI2V (`expand_timesteps`)."""
        super().model_defaults(checkpoint)
        return {"frame_rate": _TI2V_FRAME_RATE} if checkpoint.index.get("expand_timesteps") else {}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Validate as for Wan 2.1, and set the number of steps to the number of timesteps."""
        params, warnings = super().round_and_validate(checkpoint, given)
        steps = len(self.dmd_denoising_steps)
        params = replace(params, num_inference_steps=steps)
        if "num_inference_steps" not in given or self.num_inference_steps == steps:
            return params, warnings
        message = f"{self.num_inference_steps} is not the number of dmd_denoising_steps; {steps} is used instead"
        return params, (*warnings, ParamWarning("num_inference_steps", message))

    def _check_steps(self, checkpoint: Checkpoint) -> None:
        """Check that the timesteps are a non-empty, descending list of whole numbers. Raises InvalidInput."""
        del checkpoint
        timesteps = self.dmd_denoising_steps
        is_descending = all(later < earlier for earlier, later in pairwise(timesteps))
        if not (timesteps and is_descending and all(each.is_integer() for each in timesteps)):
            message = f"dmd_denoising_steps: {list(timesteps)} is not a list of whole numbers from high to low"
            raise InvalidInput(f"{message}; 1000, 757, 522 works", field="dmd_denoising_steps")


@dataclass(frozen=True, kw_only=True)
class WanCausalDMDSamplingParams(WanDMDSamplingParams):
    """Self Forcing: each block of latent frames takes four steps of the flow schedule with shift 5."""

    other_versions: ClassVar[Mapping[str, str]] = WanSamplingParams.other_versions

    num_inference_steps: int = 4
    dmd_denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    flow_shift: float = 5.0

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The base class's defaults. Raises CheckpointError, also for a transformer without causal attention."""
        _causal_config(checkpoint)
        return super().model_defaults(checkpoint)

    def _with_whole_latent_frames(self, checkpoint: Checkpoint) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round frames as Wan 2.1 does, then down to whole blocks, or up to one block.

        Raises InvalidInput for more frames than the model supports.
        """
        factor, config = temporal_factor(checkpoint), _causal_config(checkpoint)
        block, asked = config.num_frames_per_block, self.num_frames
        blocks = max(1, (asked // factor + 1) // block)
        latent_frames = blocks * block
        if config.max_frames is not None and latent_frames > config.max_frames:
            limit = (config.max_frames // block * block - 1) * factor + 1
            raise InvalidInput(f"num_frames: {asked} is not at most {limit}; {limit} works", field="num_frames")
        frames = (latent_frames - 1) * factor + 1
        if frames == asked:
            return self, ()
        message = f"{asked} does not fill blocks of {block} latent frames; {frames} is used instead"
        return replace(self, num_frames=frames), (ParamWarning("num_frames", message),)


def _causal_config(checkpoint: Checkpoint) -> CausalWanTransformerConfig:
    return CausalWanTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
