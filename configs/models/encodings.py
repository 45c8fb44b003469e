"""A text encoder as data: which text it reads, how much of it, and which of its outputs the denoiser gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from common.artifacts import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptText:
    """A text and the request's field that it came from, for warnings."""

    field: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """Chat text that a language model expects around a prompt.

    `skipped` is how many of the first tokens the encoding's output leaves out: as many as the model was trained with.
    """

    before: str
    after: str
    skipped: int


@dataclass(frozen=True, kw_only=True)
class Connector:
    """A module behind a text encoder that makes several of the denoiser's keywords.

    `connect` calls the module, whose name is `module`, with the encoding's output and the attention mask, int64
    (batch, tokens).
    """

    module: str
    connect: Callable[[Any, Tensor, Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ImageTextEncoding:
    """One pass of a language model that looks at pictures too.

    `keyword` is the argument of the denoiser's forward() that the result becomes; `tokenizer`, `encoder` and
    `processor` are module names. The `template` for a number of pictures holds `picture_mark` for each, which is
    repeated for each of its tokens. `picture_size` is the height and width (pixels) that a picture of a height and
    width is looked at in. `most_tokens` of the result can be placed by the denoiser next to a picture of a size.
    """

    keyword: str
    tokenizer: str
    encoder: str
    processor: str
    template: Callable[[int], Template]
    picture_mark: str
    picture_size: Callable[[int, int], tuple[int, int]]
    most_tokens: Callable[[int, int], int]


@dataclass(frozen=True, kw_only=True)
class TextEncoding:
    """One pass of one text encoder.

    `keyword` is the argument of the denoiser's forward() that the result becomes. `tokenizer` and `encoder` are module
    names of the checkpoint. `max_length` is the number of tokens that the text is padded or cut to; None means the
    tokenizer's own. `output` picks the result, batch first, from what the encoder returned and the attention mask,
    int64 (batch, tokens). `masked` encoders get that mask; the others attend to padding, which is on `padding_side`
    (None: the tokenizer's own). Text in a `template` is not padded and has no end mark; its max_length does not count
    what the template skips. A text with `has_marks` begins and ends with special tokens of its own: the tokenizer adds
    none. With a `connector`, the keywords are those that it makes of the result.
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
    has_marks: bool = False
    connector: Connector | None = None


def whole_prompt(prompt: Prompt) -> PromptText:
    """The prompt as it is."""
    return PromptText(field="prompt", text=prompt.prompt)


def sequence_length(default: int) -> Callable[[Prompt], int]:
    """The request's `max_sequence_length`, or that of the model."""
    return lambda prompt: prompt.max_sequence_length or default
