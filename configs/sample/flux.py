"""Sampling parameters of FLUX.1, as Diffusers 0.42's FluxPipeline takes and rounds them."""

from __future__ import annotations

from dataclasses import dataclass

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from configs.sample.base import parameter
from configs.sample.packed import PackedSamplingParams


@dataclass(frozen=True, kw_only=True)
class FluxSamplingParams(PackedSamplingParams):
    """FLUX.1-dev, FLUX.1-schnell and their fine-tunes.

    guidance_scale feeds an embedding of guidance-distilled models; true_cfg_scale above 1 with a negative prompt is
    classifier-free guidance. Sizes are multiples of what the VAE and the 2x2 packing reduce together.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    prompt_2: str | None = parameter("Text for the T5 encoder; unset means prompt.", None)
    negative_prompt_2: str | None = parameter("Negative text for T5; unset means negative_prompt.", None)
    max_sequence_length: int = parameter("Tokens of the prompt that T5 reads.", 512, minimum=1, maximum=512)

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """From the number of the VAE's blocks."""
        return vae_scale_factor(checkpoint)

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """What FluxPipeline passes over in silence."""
        idle = super().without_effect(checkpoint)
        if self.negative_prompt is None:
            idle["negative_prompt_2"] = "without negative_prompt"
        elif "negative_prompt" in idle:
            idle["negative_prompt_2"] = idle["negative_prompt"]
        if not checkpoint.module_config("transformer").get("guidance_embeds", False):
            idle["guidance_scale"] = "on this model, which has no guidance embedding"
        return idle


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels a side that become one latent. Raises CheckpointError where the VAE's config does not tell."""
    channels = checkpoint.module_config("vae").get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise CheckpointError(f"{checkpoint.path / 'vae'} has no block_out_channels in its config.json")
    return 1 << (len(channels) - 1)
