"""Builds small LTX-Video checkpoints with random weights: valid Diffusers directories.

Scale factors as published: 32 pixels per side and 8 frames per latent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tiny_flux import randomize, t5_model, t5_tokenizer

CHANNELS = 8
HEADS, HEAD_SIZE = 4, 8
SIZE = HEADS * HEAD_SIZE
CAPTION_SIZE = 32


def build_tiny_ltx_video_095(path: Path) -> Path:
    """Write a checkpoint with the VAE of 0.9.5, as LTXImageToVideoPipeline saves it."""
    return build_tiny_ltx_video(path, version="0.9.5", kind=LTXImageToVideoPipeline)


def build_tiny_ltx_video(
    path: Path,
    *,
    version: str = "0.9.0",
    kind: type[LTXPipeline | LTXImageToVideoPipeline] = LTXPipeline,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with the VAE of 0.9.0 or 0.9.5. LTXPipeline and LTXImageToVideoPipeline load the directory."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    text_encoder = t5_model(tokenizer)
    transformer = LTXVideoTransformer3DModel(**transformer_sizes())
    vae = AutoencoderKLLTXVideo(**vae_sizes(version))
    for module in (text_encoder, transformer, vae):
        randomize(module)
    with torch.no_grad():
        count = torch.arange(CHANNELS)
        vae.latents_mean.copy_(0.4 * torch.sin(count))
        vae.latents_std.copy_(0.8 + 0.3 * torch.cos(2 * count))
        if version == "0.9.5":
            vae.decoder.timestep_scale_multiplier.fill_(1000.0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    modules = {"text_encoder": text_encoder, "tokenizer": tokenizer, "transformer": transformer, "vae": vae}
    kind(scheduler=scheduler, **modules).save_pretrained(str(path))
    return path


def transformer_sizes() -> dict[str, Any]:
    """Arguments of LTXVideoTransformer3DModel."""
    return {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_SIZE,
        "cross_attention_dim": SIZE,
        "num_layers": 2,
        "caption_channels": CAPTION_SIZE,
    }


def vae_sizes(version: str) -> dict[str, Any]:
    """Arguments of AutoencoderKLLTXVideo, with the layer types of the published VAEs."""
    if version == "0.9.0":
        return {
            "latent_channels": CHANNELS,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "scaling_factor": 0.9,
        }
    return {
        "latent_channels": CHANNELS,
        "block_out_channels": (8, 8, 8, 8, 8),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, True, True),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    }
