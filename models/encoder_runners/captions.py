"""Captions an image with a vision-language model."""

# ruff: noqa: RUF001  (one prompt is Chinese, with Chinese punctuation)

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from common.json_file import is_listed, read_json
from models.encoder_runners.callbacks import OnToken
from models.encoder_runners.checks import check_patch_processor, check_tokenizer
from models.loader import load_pretrained

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

MAX_CAPTION_TOKENS = 512
IMAGE_TOKEN = "<|image_pad|>"

# Line breaks as in Diffusers.
CHINESE = (
    "<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "# 图像标注器\n"
    "你是一个专业的图像标注器。请基于输入图像，撰写图注:\n"
    "1.\n"
    "使用自然、描述性的语言撰写图注，不要使用结构化形式或富文本形式。\n"
    "2. 通过加入以下内容，丰富图注细节：\n"
    " - 对象的属性：如数量、颜色、形状、大小、位置、材质、状态、动作等\n"
    " -\n"
    "对象间的视觉关系：如空间关系、功能关系、动作关系、从属关系、比较关系、因果关系等\n"
    " - 环境细节：例如天气、光照、颜色、纹理、气氛等\n"
    " - 文字内容：识别图像中清晰可见的文字，不做翻译和解释，用引号在图注中强调\n"
    "3.\n"
    "保持真实性与准确性：\n"
    " - 不要使用笼统的描述\n"
    " -\n"
    "描述图像中所有可见的信息，但不要加入没有在图像中出现的内容\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    "<|im_start|>assistant\n"
)
ENGLISH = (
    "<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
    "# Image Annotator\n"
    "You are a professional\n"
    "image annotator. Please write an image caption based on the input image:\n"
    "1. Write the caption using natural,\n"
    "descriptive language without structured formats or rich text.\n"
    "2. Enrich caption details by including: \n"
    " - Object\n"
    "attributes, such as quantity, color, shape, size, material, state, position, actions, and so on\n"
    " - Vision Relations\n"
    "between objects, such as spatial relations, functional relations, possessive relations, attachment "
    "relations, action\n"
    "relations, comparative relations, causal relations, and so on\n"
    " - Environmental details, such as weather, lighting,\n"
    "colors, textures, atmosphere, and so on\n"
    " - Identify the text clearly visible in the image, without translation or\n"
    "explanation, and highlight it in the caption with quotation marks\n"
    "3. Maintain authenticity and accuracy:\n"
    " - Avoid\n"
    "generalizations\n"
    " - Describe all visible information in the image, while do not add information not explicitly shown in\n"
    "the image\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    "<|im_start|>assistant\n"
)

_SETTINGS_FILE = "generation_config.json"


class Captioner:
    """A vision-language model with its tokenizer and image processor.

    Decoding is greedy regardless of the checkpoint's sampling settings; the temperature of published checkpoints is so
    low that the result is the same. Raises CheckpointError for incompatible modules.
    """

    def __init__(self, tokenizer: Any, processor: Any, model: Any, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._processor = processor
        self._model = model
        self._device = device
        # The model stores the RoPE positions of the current image between forward passes.
        self._lock = threading.Lock()
        check_tokenizer("tokenizer", tokenizer, "text_encoder", model.get_input_embeddings().num_embeddings)
        check_patch_processor("processor", processor, "text_encoder", model)
        self._settings = copy.deepcopy(model.generation_config)
        self._settings.update(do_sample=False, temperature=None, top_k=None, top_p=None, use_cache=True)

    def caption(self, image: Image.Image, on_token: OnToken, *, in_english: bool) -> str:
        """Return a caption of at most 512 tokens, in English or Chinese. Propagates exceptions of `on_token`."""
        seen = self._processor(images=[image], return_tensors="pt")
        (grid,) = seen.image_grid_thw
        marks = IMAGE_TOKEN * (int(grid.prod()) // self._processor.merge_size**2)
        text = (ENGLISH if in_english else CHINESE).replace(IMAGE_TOKEN, marks)
        given = self._tokenizer(text, return_tensors="pt").to(self._device)
        begin = given.input_ids.shape[1]
        mark = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        with self._lock:
            tokens = self._model.generate(
                **given,
                mm_token_type_ids=(given.input_ids == mark).long(),
                pixel_values=seen.pixel_values.to(self._device),
                image_grid_thw=seen.image_grid_thw.to(self._device),
                generation_config=self._settings,
                max_new_tokens=MAX_CAPTION_TOKENS,
                stopping_criteria=StoppingCriteriaList([_EachToken(begin, on_token)]),
            )
        caption: str = self._tokenizer.decode(
            tokens[0, begin:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return caption.strip()


class _EachToken(StoppingCriteria):  # type: ignore[misc]
    """Calls `on_token` for each token after the first `begin` tokens; never requests a stop."""

    def __init__(self, begin: int, on_token: OnToken) -> None:
        self._begin = begin
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """Return False for each sequence."""
        del scores
        self._on_token(input_ids.shape[1] - self._begin, MAX_CAPTION_TOKENS)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load_captioning_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the whole model, including the language modeling head. Raises CheckpointError.

    Without generation_config.json, generation settings come from config.json, as in Diffusers.
    """
    settings = checkpoint.path / name / _SETTINGS_FILE
    if is_listed(settings):
        # Raises for an invalid file, which transformers would ignore.
        read_json(settings)
    model = load_pretrained(checkpoint, name, device, dtype)
    model.model.language_model.config.use_cache = False
    return model
