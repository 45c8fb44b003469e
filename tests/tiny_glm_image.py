"""Builds small GLM-Image checkpoints with random weights: valid Diffusers directories.

The language model samples image codes only: ids of the image start and end tokens are above its output vocabulary.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    ByT5Tokenizer,
    GenerationConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tiny_flux import HEAD_SIZE, HEADS, LATENT_CHANNELS, WORDS, randomize

CODES = 64
"""Number of image codes, which are prior tokens of the DiT; greater than generate()'s default top_k."""
GLYPH_SIZE = 32
IMAGE_START, IMAGE_END = f"<|dit_token_{CODES}|>", f"<|dit_token_{CODES + 1}|>"
MARKS = ("<|pad|>", "<|image|>", "<sop>", "<eop>", "<|user|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_START + "<|image|>" + IMAGE_END + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose first ids are the image codes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    codes = [f"<|dit_token_{code}|>" for code in range(CODES + 2)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*codes, *MARKS],
    )
    trained.train_from_iterator((" ".join(WORDS),), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=4096,
        pad_token="<|pad|>",
        bos_token=IMAGE_START,
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_glm_image(
    path: Path, *, codes: int = CODES, generation: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    """Write a checkpoint. The language model samples from the first `codes` ids.

    `generation` overrides entries of the language model's generation config.
    """
    torch.manual_seed(seed)
    tokenizer = glm_tokenizer()
    modules: dict[str, Any] = {
        "text_encoder": _glyph_encoder(),
        "vision_language_encoder": language_model(tokenizer, codes),
        "transformer": GlmImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=HEADS,
            text_embed_dim=GLYPH_SIZE,
            time_embed_dim=32,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=CODES,
        ),
        "vae": _vae(),
    }
    for module in modules.values():
        assert isinstance(module, nn.Module)
        randomize(module)
    settings = {"do_sample": True, "temperature": 0.9, "top_p": 0.75, "eos_token_id": CODES + 1, **(generation or {})}
    modules["vision_language_encoder"].generation_config = GenerationConfig(**settings)
    processor = glm_processor(tokenizer)
    GlmImagePipeline(tokenizer=ByT5Tokenizer(), processor=processor, scheduler=_scheduler(), **modules).save_pretrained(
        str(path)
    )
    # Published checkpoints have "transformers" as the library of the processor and the language model; Diffusers
    # writes "glm_image", the name of the pipeline's package.
    index = path / "model_index.json"
    index.write_text(index.read_text().replace('"glm_image"', '"transformers"'))
    return path


def edited(path: Path, copy: Path, folder: str, file: str, entries: dict[str, Any]) -> Path:
    """Copy a checkpoint and change entries in one of its JSON files."""
    shutil.copytree(path, copy)
    target = copy / folder / file
    target.write_text(json.dumps(json.loads(target.read_text()) | entries))
    return copy


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.25,
        max_shift=0.75,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="linear",
    )


def _glyph_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=384,
            d_model=GLYPH_SIZE,
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


def glm_processor(tokenizer: PreTrainedTokenizerFast) -> GlmImageProcessor:
    """A processor whose image half matches the tiny vision tower."""
    images = GlmImageImageProcessorPil(patch_size=16, merge_size=1, temporal_patch_size=1)
    return GlmImageProcessor(image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def language_model(tokenizer: PreTrainedTokenizerFast, codes: int, **text: Any) -> GlmImageForConditionalGeneration:
    """A language model that samples from the first `codes` ids; `text` overrides sizes of its text half."""
    mark, start, end, pad = tokenizer.convert_tokens_to_ids(["<|image|>", IMAGE_START, IMAGE_END, "<|pad|>"])
    config = GlmImageConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "vision_vocab_size": codes,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "pad_token_id": pad,
            "eos_token_id": end,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            **text,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 16,
            "image_size": 64,
        },
        vq_config={"embed_dim": 16, "num_embeddings": CODES, "latent_channels": 32},
        image_token_id=mark,
        image_start_token_id=start,
        image_end_token_id=end,
    )
    return GlmImageForConditionalGeneration(config)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        latents_mean=[0.1 * (channel - 8) for channel in range(LATENT_CHANNELS)],
        latents_std=[0.8 + 0.05 * channel for channel in range(LATENT_CHANNELS)],
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
