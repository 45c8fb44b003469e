"""Builds small FLUX.2 klein checkpoints with random weights: genuine Diffusers directories, made here, offline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tiny_flux import randomise
from tiny_qwen_image import qwen_tokenizer

LATENT_CHANNELS = 8
STATE_SIZE = 16
TEXT_SIZE = 3 * STATE_SIZE
TURN = "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
"""The template of a chat of one message, as the published tokenizer renders it without thinking."""


def build_tiny_flux2_klein(path: Path, *, is_distilled: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint of the layout of FLUX.2 klein."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TURN
    tokenizer.padding_side = "right"
    transformer = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=TEXT_SIZE,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
    )
    text_encoder = _text_encoder(tokenizer)
    for module in (transformer, vae, text_encoder):
        randomise(module)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    ).save_pretrained(str(path))
    return path


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=STATE_SIZE,
        intermediate_size=24,
        num_hidden_layers=28,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)
