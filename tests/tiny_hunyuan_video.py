"""Builds small HunyuanVideo checkpoints with random weights: valid Diffusers directories.

The tokenizer is trained on the template, so that each word is one token and the template has as many tokens as with the
published tokenizer: 95 before the prompt, including BOS.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from configs.pipeline_configs.hunyuan_video import TEMPLATE
from tiny_flux import WORDS, clip_model, clip_tokenizer, randomize

LATENT_CHANNELS = 4
TEXT_SIZE, POOLED_SIZE = 32, 24
BEGIN, PAD = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (BEGIN, PAD, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""Pre-tokenizer pattern that splits text into words."""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the template's words; it encodes any text."""
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS_OF_LLAMA_3), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIAL_TOKENS),
    )
    trained.train_from_iterator((re.sub(r"<\|.*?\|>", "\n", TEMPLATE.before), " ".join(WORDS)), trainer)
    trained.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, trained.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token=BEGIN, eos_token="<|eot_id|>", pad_token=PAD, padding_side="right"
    )


def build_tiny_hunyuan_video(
    path: Path, *, text_size: int = TEXT_SIZE, guidance_embeds: bool = True, seed: int = 0
) -> Path:
    """Write a text-to-video checkpoint."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer()
    text_encoder, text_encoder_2 = _llama_model(tokenizer, text_size), clip_model(tokenizer_2)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_SIZE,
        pooled_projection_dim=POOLED_SIZE,
        guidance_embeds=guidance_embeds,
        rope_axes_dim=(4, 6, 6),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    for module in (transformer, vae, text_encoder, text_encoder_2):
        randomize(module)
    HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(str(path))
    return path


def _llama_model(tokenizer: PreTrainedTokenizerFast, size: int) -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
        )
    )
