"""Sampling parameters of FLUX.1, following Diffusers 0.42's FluxPipeline."""

from __future__ import annotations

from dataclasses import dataclass

from common.checkpoint import Checkpoint
from common.errors import CheckpointError
from configs.sample.base import parameter
from configs.sample.packed import PackedSamplingParams


@dataclass(frozen=True, kw_only=True)
class FluxSamplingParams(PackedSamplingParams):
    """FLUX.1-dev, FLUX.1-schnell and their fine-tunes.

    Guidance-distilled models embed guidance_scale. A true_cfg_scale above 1 with a negative prompt enables
    classifier-free guidance. Sizes are multiples of a packed 2x2 patch of latents.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    prompt_2: str | None = parameter("Prompt for the T5 encoder; if unset, prompt is used.", None)
    negative_prompt_2: str | None = parameter(
        "Negative prompt for the T5 encoder; if unset, negative_prompt is used.", None
    )
    max_sequence_length: int = parameter("Maximum number of prompt tokens for T5.", 512, minimum=1, maximum=512)

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """The VAE's spatial factor, from its number of blocks."""
        return vae_scale_factor(checkpoint)

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Parameters that FluxPipeline ignores silently."""
        idle = super().without_effect(checkpoint)
        if self.negative_prompt is None:
            idle["negative_prompt_2"] = "without negative_prompt"
        elif "negative_prompt" in idle:
            idle["negative_prompt_2"] = idle["negative_prompt"]
        if not checkpoint.module_config("transformer").get("guidance_embeds", False):
            idle["guidance_scale"] = "on this model, which has no guidance embedding"
        return idle


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels along each side of a latent. Raises CheckpointError if block_out_channels is missing."""
    channels = checkpoint.module_config("vae").get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise CheckpointError(f"vae/config.json: block_out_channels: {channels!r} is not a list of numbers")
    return 1 << (len(channels) - 1)
