"""Descriptions of text encoders: input text, maximum length, and output for the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from common.artifacts import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A text and the request field that contains it, for warnings."""

    field: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """Chat template text around a prompt.

    `skipped` is the number of leading tokens to drop from the output, as in training.
    """

    before: str
    after: str
    skipped: int


@dataclass(frozen=True, kw_only=True)
class Connector:
    """A module that maps a text encoder's output to several keyword arguments of the denoiser.

    `module` is its module name. `connect` calls it with the encoding's output and the attention mask, int64 (batch,
    tokens).
    """

    module: str
    connect: Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ImageTextEncoding:
    """One forward pass of a vision-language model on text and images.

    `keyword` is the denoiser's keyword argument for the result. `tokenizer`, `encoder` and `processor` are module
    names. `template` maps the number of images to a template with one `image_token` per image, which is repeated for
    each token of the image. `image_size` maps an image's height and width (pixels) to the size for the encoder.
    `max_tokens` maps an image's height and width (pixels) to the maximum length of the result, limited by the
    denoiser's positions.
    """

    keyword: str
    tokenizer: str
    encoder: str
    processor: str
    template: Callable[[int], Template]
    image_token: str
    image_size: Callable[[int, int], tuple[int, int]]
    max_tokens: Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """One forward pass of a text encoder.

    `keyword` is the denoiser's keyword argument for the result. `tokenizer` and `encoder` are module names. The text is
    padded or truncated to `max_length` tokens; None: the tokenizer's maximum. `output` selects the result, batch first,
    from the encoder's output and the attention mask, int64 (batch, tokens). The encoder gets the mask only if `masked`;
    otherwise it attends to padding. `padding_side` None: the tokenizer's default.

    Text in a `template` is not padded and gets no end-of-sequence token; `max_length` does not count skipped tokens. If
    `has_special_tokens`, the text already contains its special tokens, and the tokenizer adds none. With a `connector`,
    the connector's keyword arguments replace `keyword`.
    """

    keyword: str
    tokenizer: str
    encoder: str
    text: Callable[[Prompt], PromptText]
    max_length: Callable[[Prompt], int | None]
    output: Callable[[Any, Tensor], Tensor]
    masked: bool = False
    padding_side: Literal["left", "right"] | None = None
    template: Template | None = None
    has_special_tokens: bool = False
    connector: Connector | None = None


def whole_prompt(prompt: Prompt) -> PromptText:
    """The unmodified prompt."""
    return PromptText(field="prompt", text=prompt.prompt)


def second_prompt(prompt: Prompt) -> PromptText:
    """`prompt_2`, or the prompt if it is unset."""
    return PromptText(field="prompt_2", text=prompt.prompt_2) if prompt.prompt_2 else whole_prompt(prompt)


def pooled_output(output: Any, _: Tensor) -> Tensor:
    """The encoder's pooled output, (B, size)."""
    pooled: Tensor = output.pooler_output
    return pooled


def hidden_states(layer: int | None = None, *, skipped: int = 0) -> Callable[[Any, Tensor], Tensor]:
    """Select the hidden states (B, tokens, size) of a layer, without the first `skipped` tokens.

    `layer` indexes the encoder's hidden_states; None: the last hidden state, after the final norm.
    """

    def select(output: Any, _: Tensor) -> Tensor:
        hidden: Tensor = output.last_hidden_state if layer is None else output.hidden_states[layer]
        return hidden[:, skipped:]

    return select


def sequence_length(default: int) -> Callable[[Prompt], int]:
    """The request's `max_sequence_length`, or `default` if it is unset."""
    return lambda prompt: prompt.max_sequence_length or default
