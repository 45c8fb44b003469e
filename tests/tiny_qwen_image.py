"""Builds small Qwen-Image checkpoints with random weights: valid Diffusers directories.

The tokenizer is trained on the templates, so that each word is one token and the templates have as many tokens as with
the published tokenizer: 34 before the prompt, or 64 with an input image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from tiny_flux import WORDS, randomize

LATENT_CHANNELS = 16
HEADS, HEAD_SIZE = 4, 16
TEXT_SIZE = 32
# Maximum number of image tokens that the language model reads per image. A token has 28x28 pixels.
VISION_TOKENS = 64
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

# Training text of the tokenizer: the templates without special tokens.
TEMPLATES = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships "
    "of the objects and background:\nuser\nassistant\n",
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.",
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE trained on the templates' words; it encodes any text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=1, show_progress=False, initial_alphabet=sorted(ByteLevel.alphabet())
    )
    trained.train_from_iterator((*TEMPLATES, " ".join(WORDS)), trainer)
    learned = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        model_max_length=131072,
        extra_special_tokens=list(SPECIAL_TOKENS),
    )


def build_tiny_qwen_image(path: Path, *, text_size: int = TEXT_SIZE, seed: int = 0, **transformer: bool) -> Path:
    """Write a text-to-image checkpoint; `transformer` overrides arguments of the DiT."""
    torch.manual_seed(seed)
    modules = _modules(text_size, **transformer)
    QwenImagePipeline(scheduler=_scheduler(), **modules).save_pretrained(str(path))
    return path


def build_tiny_qwen_image_edit(path: Path, *, seed: int = 0) -> Path:
    """Write an image-editing checkpoint; its processor is saved in parts, which need no torchvision."""
    build_tiny_qwen_image(path, seed=seed)
    return _with_processor(path, "QwenImageEditPipeline")


def build_tiny_qwen_image_edit_plus(path: Path, *, zero_cond_t: bool = True, seed: int = 0) -> Path:
    """Write an image-editing checkpoint for several images: like 2511, or like 2509 without zero_cond_t."""
    build_tiny_qwen_image(path, seed=seed, zero_cond_t=zero_cond_t)
    return _with_processor(path, "QwenImageEditPlusPipeline")


def build_tiny_qwen_image_layered(path: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint that splits an image into layers; its image captions end after a few tokens."""
    torch.manual_seed(seed)
    modules = _modules(TEXT_SIZE, use_additional_t_cond=True, use_layer3d_rope=True)
    modules["vae"] = AutoencoderKLQwenImage(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1, input_channels=4)
    randomize(modules["vae"])
    encoder = modules["text_encoder"]
    encoder.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.05,
        pad_token_id=0,
        eos_token_id=list(range(0, encoder.config.text_config.vocab_size, 7)),
    )
    QwenImagePipeline(scheduler=_scheduler(), **modules).save_pretrained(str(path))
    return _with_processor(path, "QwenImageLayeredPipeline")


def _with_processor(path: Path, pipeline: str) -> Path:
    """Add an image processor to a checkpoint, and change its pipeline class."""
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * VISION_TOKENS}).save_pretrained(
        path / "processor"
    )
    qwen_tokenizer().save_pretrained(path / "processor")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"_class_name": pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def open_edit_reference(path: Path) -> QwenImageEditPipeline:
    """Open Diffusers' QwenImageEditPipeline. The processor is built here, as from_pretrained() needs torchvision."""
    return QwenImageEditPipeline.from_pretrained(path, processor=processor_without_video(path))


def open_edit_plus_reference(path: Path) -> QwenImageEditPlusPipeline:
    """Open Diffusers' QwenImageEditPlusPipeline, as open_edit_reference() does."""
    return QwenImageEditPlusPipeline.from_pretrained(path, processor=processor_without_video(path))


def open_layered_reference(path: Path) -> QwenImageLayeredPipeline:
    """Open Diffusers' QwenImageLayeredPipeline, as open_edit_reference() does."""
    return QwenImageLayeredPipeline.from_pretrained(path, processor=processor_without_video(path))


def processor_without_video(path: Path) -> Qwen2VLProcessor:
    """Build a checkpoint's processor without its video half."""
    return _ProcessorWithoutVideo(
        Qwen2VLImageProcessorPil.from_pretrained(path / "processor"),
        Qwen2Tokenizer.from_pretrained(path / "processor"),
    )


class _ProcessorWithoutVideo(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2VLProcessor without its video half."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept a missing video processor."""
        return argument_name, type(argument)


def _modules(text_size: int, **transformer: bool) -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(tokenizer, text_size),
        "transformer": QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=HEAD_SIZE,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_SIZE,
            axes_dims_rope=(4, 6, 6),
            **transformer,
        ),
        "vae": AutoencoderKLQwenImage(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1),
    }
    for module in modules.values():
        if isinstance(module, nn.Module):
            randomize(module)
    return modules


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def _text_encoder(tokenizer: Qwen2Tokenizer, size: int) -> Qwen2_5_VLForConditionalGeneration:
    image, start, end = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": size,
            "fullatt_block_indexes": [1],
        },
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return Qwen2_5_VLForConditionalGeneration(config)
