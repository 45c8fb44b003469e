"""Builds small FLUX.2 checkpoints with random weights: valid Diffusers directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, trainers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny_flux import WORDS, randomize
from tiny_qwen_image import qwen_tokenizer

LATENT_CHANNELS = 8
STATE_SIZE = 16
TEXT_SIZE = 3 * STATE_SIZE
TURN = "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
"""Chat template for one message; renders as the published template does with `enable_thinking=False`."""
MARKS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>"),
    *("[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
"""Special tokens of Mistral's tokenizer that chats and images need."""
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)
"""Chat template without images; renders as the published processor does."""


def build_tiny_flux2_klein(path: Path, *, is_distilled: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint with the layout of FLUX.2 klein."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = TURN
    tokenizer.padding_side = "right"
    modules = _modules(guidance_embeds=False)
    text_encoder = _qwen(tokenizer)
    _randomize(modules, text_encoder)
    Flux2KleinPipeline(
        text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=is_distilled, **modules
    ).save_pretrained(str(path))
    return path


def build_tiny_flux2_dev(path: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint with the layout of FLUX.2 dev.

    The parts of the processor are saved separately, as PixtralProcessor needs torchvision.
    """
    torch.manual_seed(seed)
    tokenizer = mistral_tokenizer()
    modules = _modules(guidance_embeds=True)
    text_encoder = _mistral(tokenizer)
    _randomize(modules, text_encoder)
    Flux2Pipeline(text_encoder=text_encoder, tokenizer=ChatProcessor(tokenizer, CHAT), **modules).save_pretrained(
        str(path)
    )
    PixtralImageProcessorPil().save_pretrained(path / "tokenizer")
    index = json.loads((path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def open_flux2_reference(path: Path) -> Flux2Pipeline:
    """Open Diffusers' pipeline. The processor is built here, as from_pretrained() needs torchvision."""
    template = (path / "tokenizer" / "chat_template.jinja").read_text()
    return Flux2Pipeline(
        transformer=Flux2Transformer2DModel.from_pretrained(path / "transformer"),
        vae=AutoencoderKLFlux2.from_pretrained(path / "vae"),
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(path / "text_encoder"),
        tokenizer=ChatProcessor(AutoTokenizer.from_pretrained(path / "tokenizer"), template),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
    )


class ChatProcessor(ProcessorMixin):  # type: ignore[misc]
    """The text half of PixtralProcessor: transformers renders the chat template and tokenizes the text."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that prepends a BOS token and pads on the left."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(MARKS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    trained.train_from_iterator((SYSTEM_MESSAGE, " ".join(WORDS)), trainer)
    trained.decoder = ByteLevelDecoder()
    trained.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", MARKS.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=[mark for mark in MARKS if mark.startswith("[")],
        padding_side="left",
        model_max_length=131072,
    )


def _modules(*, guidance_embeds: bool) -> dict[str, Any]:
    return {
        "transformer": Flux2Transformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=TEXT_SIZE,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
        "vae": AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=LATENT_CHANNELS,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential"),
    }


def _randomize(modules: dict[str, Any], text_encoder: nn.Module) -> None:
    for module in (modules["transformer"], modules["vae"], text_encoder):
        randomize(module)
    modules["vae"].bn.running_mean.normal_()
    modules["vae"].bn.running_var.uniform_(0.5, 2.0)


def _qwen(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
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


def _mistral(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": STATE_SIZE,
            "intermediate_size": 24,
            "num_hidden_layers": 31,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 131072,
            "sliding_window": None,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "patch_size": 14,
            "image_size": 56,
        },
        image_token_index=MARKS.index("[IMG]"),
        tie_word_embeddings=False,
    )
    return Mistral3ForConditionalGeneration(config)
