"""Few-step Wan, distilled by DMD: whole videos (FastWan, TurboWan) or block by block (Self Forcing)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from common.errors import InvalidInput
from configs.models.dits.causal_wan import CausalWanTransformerConfig
from configs.models.dits.wan import WanTransformerConfig
from configs.pipeline_configs.base import Keywords, Parts, Shapes
from configs.pipeline_configs.dmd import CausalDmdConfig, DmdConfig, nearest_levels, warped_levels
from configs.pipeline_configs.wan import WanPipelineConfig

if TYPE_CHECKING:
    from common.artifacts import Prompt, Sampling


@dataclass(frozen=True, kw_only=True)
class WanDMDPipelineConfig(WanPipelineConfig, DmdConfig):
    """Callbacks of FastVideo's WanDMDPipeline: timesteps are steps of the shifted flow schedule."""

    title: ClassVar[str] = "Few-step Wan: FastWan with full attention"
    deviations: ClassVar[str] = (
        "Diffusers has no such pipeline; FastVideo has. Weights with sparse attention are rejected, as there is no "
        "kernel for it."
    )

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """False: the model was distilled with guidance."""
        del prompt, sampling
        return False

    def own_schedule(self, sampling: Sampling) -> Sequence[tuple[float, float]]:
        """The timesteps `dmd_denoising_steps`, each with the shifted flow schedule's nearest level."""
        return nearest_levels(*_steps_and_shift(sampling))

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw with frames before channels, as in FastVideo."""
        batch, channels, frames, *size = shape
        return super().draw_noise((batch, frames, channels, *size), generator).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class WanCausalDMDPipelineConfig(WanDMDPipelineConfig, CausalDmdConfig):
    """FastVideo's WanCausalDMDPipeline (Self Forcing): timesteps are shifted like the noise levels."""

    title: ClassVar[str] = "Causal few-step Wan: Self Forcing"
    deviations: ClassVar[str] = (
        "Diffusers has no such pipeline; FastVideo has. `ring` is rejected, as the KV cache is sharded by heads."
    )

    transformer: CausalWanTransformerConfig

    transformer_config: ClassVar[type[WanTransformerConfig]] = CausalWanTransformerConfig
    module_loaders: ClassVar[Mapping[str, str]] = {
        **WanPipelineConfig.module_loaders,
        "WanTransformer3DModel": "models.dits.causal_wan_plan:load_causal_wan_transformer",
        "CausalWanTransformer3DModel": "models.dits.causal_wan_plan:load_causal_wan_transformer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"WanTransformer3DModel", "CausalWanTransformer3DModel"})
    # The KV cache is sharded by heads; a ring would send all keys and values at every step.
    parallel_axes: ClassVar[tuple[str, ...]] = ("tp", "ulysses")

    @property
    def frames_per_block(self) -> int:
        """The transformer's num_frames_per_block."""
        return self.transformer.num_frames_per_block

    def own_schedule(self, sampling: Sampling) -> Sequence[tuple[float, float]]:
        """`dmd_denoising_steps` as steps of the unshifted schedule, shifted by `flow_shift`."""
        return warped_levels(*_steps_and_shift(sampling))

    def prepared_timesteps(self, timesteps: Tensor) -> Tensor:
        """Append 0, the timestep of the context pass that writes a finished block's keys and values."""
        return torch.cat((timesteps, timesteps.new_zeros(1)))

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """The video's latent frames, rows and columns, passed as the shape of an empty tensor."""
        del embeds, sampling
        return {"video_grid": torch.empty(1, 0, *shapes["video"][2:])}


def _steps_and_shift(sampling: Sampling) -> tuple[Sequence[float], float]:
    steps, shift = sampling.params.get("dmd_denoising_steps"), sampling.params.get("flow_shift")
    if not isinstance(steps, tuple):
        raise InvalidInput(f"dmd_denoising_steps: {steps!r} is not a list of timesteps", field="dmd_denoising_steps")
    if not isinstance(shift, float):
        raise InvalidInput(f"flow_shift: {shift!r} is not a number", field="flow_shift")
    return steps, shift
