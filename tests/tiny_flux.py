"""Builds small Flux checkpoints with random weights: valid Diffusers directories.

Weights are so large that a change of one prompt word, one step or one constant changes the latents far beyond the
tolerances of the parity tests.
"""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

WORDS = ("a", "red", "blue", "apple", "car", "cat", "on", "the", "moon", "river", "old", "stone")
LATENT_CHANNELS = 16
HEADS, HEAD_SIZE = 4, 16


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with a merge chain per word. The end token has the highest id, as in CLIP's vocabulary."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for index, symbol in enumerate(word[1:], start=2):
            right = symbol if index < len(word) else f"{symbol}</w>"
            if (left, right) not in merges:
                merges.append((left, right))
            left += right
            if left not in tokens:
                tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram over printable ASCII and a few words."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -3.0) for word in WORDS]
    vocab += [(symbol, -6.0) for symbol in string.printable.strip()]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def build_tiny_flux(
    path: Path, *, guidance_embeds: bool = True, dynamic_shift: bool = True, shift: float = 1.0, seed: int = 0
) -> Path:
    """Write a checkpoint like FLUX.1-dev.

    Without `guidance_embeds` and `dynamic_shift`, the checkpoint is like FLUX.1-schnell.
    """
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": clip,
        "tokenizer_2": t5,
        "text_encoder": clip_model(clip),
        "text_encoder_2": t5_model(t5),
        "transformer": FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=HEADS,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": _vae(),
    }
    for module in modules.values():
        if isinstance(module, nn.Module):
            randomize(module)
    # FLUX.1-dev also has shift=3.0, which the scheduler ignores with dynamic shifting.
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=dynamic_shift, shift=3.0 if dynamic_shift else shift, base_shift=0.5, max_shift=1.15
    )
    FluxPipeline(scheduler=scheduler, **modules).save_pretrained(str(path))
    return path


def randomize(module: nn.Module) -> None:
    """Randomize every parameter: matrices scaled by fan-in, gains around 1, biases around 0.

    No value is exactly 0 or 1.
    """
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn_like(value)
            if value.ndim > 1:
                embedding = name.endswith(("embedding.weight", "shared.weight", "embed_tokens.weight"))
                value.copy_(noise * (1.0 if embedding else 1.2 / math.sqrt(value[0].numel())))
            elif name.endswith("bias"):
                value.copy_(0.2 * noise)
            else:
                value.copy_(1.0 + 0.2 * noise)


def clip_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model with two layers of width 24."""
    # The published Flux checkpoints have eos_token_id 2, with which CLIP pools at the highest token id.
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=24,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def t5_model(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 encoder with two layers of width 32."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
