"""Builds small Z-Image checkpoints with random weights: valid Diffusers directories."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from tiny_flux import LATENT_CHANNELS, randomize
from tiny_qwen_image import qwen_tokenizer

TEXT_SIZE = 32
TURN = "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n' }}"
"""Chat template for one message; renders as the published template does.

It is one expression, because Jinja drops a newline at the end of template text.
"""


def build_tiny_z_image(path: Path, *, text_size: int = TEXT_SIZE, shift: float = 3.0, seed: int = 0) -> Path:
    """Write a text-to-image checkpoint."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TURN
    tokenizer.padding_side = "right"
    transformer = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_SIZE,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 512, 512],
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    text_encoder = _text_encoder(tokenizer, text_size)
    for module in (transformer, vae, text_encoder):
        randomize(module)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(str(path))
    return path


def _text_encoder(tokenizer: Qwen2Tokenizer, size: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )
    return Qwen3Model(config)
