"""Builds small LTX-2 checkpoints with random weights: valid Diffusers directories.

Scale factors as published: 32 pixels and 8 frames per video latent, 4 spectrogram frames and 4 mel bins per audio
latent, 160 samples per spectrogram frame at 16 kHz.
"""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from tiny_flux import WORDS, randomize

HEADS, VIDEO_HEAD_SIZE, AUDIO_HEAD_SIZE = 4, 8, 4
VIDEO_SIZE, AUDIO_SIZE = HEADS * VIDEO_HEAD_SIZE, HEADS * AUDIO_HEAD_SIZE
VIDEO_CHANNELS = 8
AUDIO_CHANNELS, MEL_BINS = 2, 16
CAPTION_SIZE, TEXT_LAYERS = 16, 3
REGISTERS = 16
LAYERS = 3


def build_tiny_ltx2_i2v(path: Path) -> Path:
    """Write a checkpoint as LTX2ImageToVideoPipeline saves it."""
    return build_tiny_ltx2(path, kind=LTX2ImageToVideoPipeline)


def build_tiny_ltx2(
    path: Path,
    *,
    version: str = "2.3",
    registers: int | None = REGISTERS,
    kind: type[LTX2Pipeline | LTX2ImageToVideoPipeline] = LTX2Pipeline,
    seed: int = 0,
) -> Path:
    """Write a checkpoint like LTX-2.0 or LTX-2.3. LTX2Pipeline and LTX2ImageToVideoPipeline both load the directory.

    2.3 has gated attention, text modulation, separate features per modality, and a vocoder with bandwidth extension.
    """
    torch.manual_seed(seed)
    is_new = version == "2.3"
    tokenizer = gemma_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(tokenizer),
        "connectors": LTX2TextConnectors(**connector_sizes(is_new, registers)),
        "transformer": LTX2VideoTransformer3DModel(**transformer_sizes(is_new)),
        "vae": _video_vae(),
        "audio_vae": _audio_vae(),
        "vocoder": _vocoder(is_new),
    }
    for module in modules.values():
        if isinstance(module, nn.Module):
            randomize(module)
    _randomize_statistics(modules)
    if is_new:
        _soften(modules["vocoder"])
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    kind(scheduler=scheduler, **modules).save_pretrained(str(path))
    return path


def transformer_sizes(is_new: bool) -> dict[str, Any]:
    """Arguments of LTX2VideoTransformer3DModel."""
    return {
        "in_channels": VIDEO_CHANNELS,
        "out_channels": VIDEO_CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": VIDEO_HEAD_SIZE,
        "cross_attention_dim": VIDEO_SIZE,
        "gated_attn": is_new,
        "cross_attn_mod": is_new,
        "audio_in_channels": AUDIO_CHANNELS * MEL_BINS // 4,
        "audio_out_channels": AUDIO_CHANNELS * MEL_BINS // 4,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": AUDIO_HEAD_SIZE,
        "audio_cross_attention_dim": AUDIO_SIZE,
        "audio_gated_attn": is_new,
        "audio_cross_attn_mod": is_new,
        "num_layers": LAYERS,
        "caption_channels": CAPTION_SIZE,
        "rope_type": "split" if is_new else "interleaved",
        "use_prompt_embeddings": not is_new,
        "perturbed_attn": is_new,
    }


def connector_sizes(is_new: bool, registers: int | None) -> dict[str, Any]:
    """Arguments of LTX2TextConnectors."""
    sizes = {"video": VIDEO_HEAD_SIZE, "audio": AUDIO_HEAD_SIZE} if is_new else dict.fromkeys(("video", "audio"), 4)
    each = {
        f"{part}_connector_{name}": value
        for part, size in sizes.items()
        for name, value in {
            "num_attention_heads": HEADS,
            "attention_head_dim": size,
            "num_layers": 1,
            "num_learnable_registers": registers,
        }.items()
    }
    return {
        **each,
        "caption_channels": CAPTION_SIZE,
        "text_proj_in_factor": TEXT_LAYERS + 1,
        "video_gated_attn": is_new,
        "audio_gated_attn": is_new,
        "rope_type": "split" if is_new else "interleaved",
        "per_modality_projections": is_new,
        "video_hidden_dim": VIDEO_SIZE,
        "audio_hidden_dim": AUDIO_SIZE,
        "proj_bias": is_new,
    }


def gemma_tokenizer() -> GemmaTokenizer:
    """A BPE tokenizer with a merge chain per word, printable ASCII, and byte fallback."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *sorted(set(string.printable.strip()))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for symbol in f"{word[1:]}▁":
            if (left, symbol) not in merges:
                merges.append((left, symbol))
            left += symbol
            if left not in tokens:
                tokens.append(left)
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=1024)


def _text_encoder(tokenizer: GemmaTokenizer) -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": CAPTION_SIZE,
        "intermediate_size": 24,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "max_position_embeddings": 2048,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=len(tokenizer),
        boi_token_index=len(tokenizer) + 1,
        eoi_token_index=len(tokenizer) + 2,
    )
    return Gemma3ForConditionalGeneration(config)


def _video_vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=VIDEO_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        upsample_factor=(1, 1, 1),
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def _audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=AUDIO_CHANNELS * MEL_BINS // 4,
        ch_mult=(1, 2, 2),
        num_res_blocks=1,
        latent_channels=AUDIO_CHANNELS,
        mel_bins=MEL_BINS,
        resolution=MEL_BINS,
    )


def _vocoder(is_new: bool) -> LTX2Vocoder | LTX2VocoderWithBWE:
    small: dict[str, Any] = {
        "in_channels": 2 * MEL_BINS,
        "hidden_channels": 32,
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
    }
    if not is_new:
        return LTX2Vocoder(**small)
    extension = {f"bwe_{name}": value for name, value in small.items()}
    extension["bwe_in_channels"] = 2 * MEL_BINS
    # 160 samples per spectrogram frame; bandwidth extension triples the sample rate (240 per 80 samples).
    rates: dict[str, Any] = {"upsample_factors": [5, 4, 4, 2], "upsample_kernel_sizes": [11, 8, 8, 4]}
    rates |= {"bwe_upsample_factors": [6, 5, 4, 2], "bwe_upsample_kernel_sizes": [12, 11, 8, 4]}
    return LTX2VocoderWithBWE(
        **small, **extension, **rates, num_mel_channels=MEL_BINS, filter_length=64, window_length=64, hop_length=80
    )


def _randomize_statistics(modules: dict[str, Any]) -> None:
    """Replace buffers by nontrivial values: statistics of both latents, and the vocoder's mel transform."""
    with torch.no_grad():
        for name in ("vae", "audio_vae"):
            count = torch.arange(len(modules[name].latents_mean))
            modules[name].latents_mean.copy_(0.4 * torch.sin(count))
            modules[name].latents_std.copy_(0.8 + 0.3 * torch.cos(2 * count))
        for name, buffer in modules["vocoder"].named_buffers():
            if name.endswith("basis"):
                buffer.copy_(torch.randn_like(buffer).abs() / math.sqrt(buffer.shape[-1]))


def _soften(vocoder: nn.Module) -> None:
    """Scale weights down so that the audio amplitude is small; otherwise almost every sample is clipped."""
    with torch.no_grad():
        for name, value in vocoder.named_parameters():
            if "conv_out" in name:
                value.mul_(0.002)


def edit_json(file: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
