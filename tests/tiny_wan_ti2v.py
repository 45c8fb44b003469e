"""Builds the part of a small Wan 2.2 TI2V checkpoint after its text encoder: 48 latent channels, `expand_timesteps`.

A genuine Diffusers directory with random weights, made here, offline. Its VAE is the plain one, with 8 pixels a latent:
what the denoiser and its configs depend on is in the VAE's config.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

from tiny_flux import randomise

CHANNELS = 48
TEXT_SIZE = 32


def build_tiny_ti2v_denoiser(path: Path, *, seed: int = 0) -> Path:
    """Write transformer, VAE and scheduler."""
    torch.manual_seed(seed)
    modules = {
        "transformer": WanTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=4,
            attention_head_dim=16,
            text_dim=TEXT_SIZE,
            freq_dim=32,
            ffn_dim=96,
            num_layers=2,
        ),
        "vae": AutoencoderKLWan(
            base_dim=8,
            num_res_blocks=1,
            z_dim=CHANNELS,
            latents_mean=[0.4 * math.sin(channel) for channel in range(CHANNELS)],
            latents_std=[1.0 + 0.5 * math.cos(2 * channel) for channel in range(CHANNELS)],
        ),
    }
    for name, module in modules.items():
        randomise(module)
        module.save_pretrained(path / name)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0).save_pretrained(
        path / "scheduler"
    )
    index = {
        "_class_name": "WanPipeline",
        "expand_timesteps": True,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
