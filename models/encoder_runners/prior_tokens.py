"""Samples an image's prior tokens with GLM-Image's autoregressive language model.

The model continues the prompt with a small preview image of about 256 tokens, then with the image's tokens: one token
per 32x32 pixels. Each request has its own generator, from which tokens are drawn in the same way as in transformers'
generate(): for the same seed, the tokens equal the tokens of Diffusers' pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.errors import CheckpointError, InvalidInput
from common.package_guard import Attributes, Parameters, PrivateApi, check_private_api
from models.encoder_runners.callbacks import OnToken
from models.encoder_runners.checks import check_tokenizer
from models.loader import load_pretrained, load_tokenizer

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

PIXELS = 32
"""Pixels along each side of an image token."""
UPSAMPLING = 2
"""Prior tokens of the DiT along each side of an image token."""

Grid = tuple[int, int]

_TEMPLATE_FILE = "chat_template.jinja"
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", _TEMPLATE_FILE)
_SETTINGS_FILE = "vision_language_encoder/generation_config.json"
_PROBE = "a red apple"

PRIVATE_API = PrivateApi(
    "transformers",
    "the prior token sampler",
    (
        Parameters(
            "transformers.models.glm_image.modeling_glm_image:GlmImageTextModel.forward",
            ("self", "input_ids", "attention_mask", "position_ids", "cache|past_key_values", "inputs_embeds"),
            overridden=False,
        ),
        Attributes("transformers:GenerationConfig", ("_from_model_config",)),
    ),
)
"""Private attributes and signatures that the sampler depends on.

forward() gets positional arguments. Only `_from_model_config` indicates that generation_config.json is missing.
"""

# transformers' defaults for settings that generation_config.json omits.
_TEMPERATURE = 1.0
"""Divisor of the logits; 1 leaves them unchanged."""
_TOP_K = 50
"""Number of tokens with the largest logits that may be sampled."""
_TOP_P = 1.0
"""Only the most likely tokens that together have this probability may be sampled; 1 permits all tokens."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "num_beams"), (None, 1)),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size"), (None, 0)),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (None, 0)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), (None,)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "watermarking_config", "top_h"), (None,)),
    **dict.fromkeys(("exponential_decay_length_penalty", "penalty_alpha", "dola_layers"), (None,)),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values"), (None, False)),
    "guidance_scale": (None, 1),
}
"""Unsupported sampling settings, each with its neutral values."""


class PriorTokenSampler:
    """The language model and its processor. Raises CheckpointError if they are incompatible.

    Raises UnsupportedPackage if transformers' private functions differ from PRIVATE_API. `codebook_size` is the DiT's
    number of prior token embeddings.
    """

    def __init__(self, processor: Any, model: Any, codebook_size: int, device: torch.device) -> None:
        check_private_api(PRIVATE_API)
        self._processor = processor
        self._lm_head = model.lm_head
        self._language_model = model.model.language_model
        self._config = model.config
        self._codebook_size = codebook_size
        self._device = device
        known = self._language_model.get_input_embeddings().num_embeddings
        check_tokenizer("processor", processor.tokenizer, "vision_language_encoder", known)
        self._check_template()
        self._warpers = _warpers(model.generation_config)
        self._ends = _ends(model.generation_config.eos_token_id)
        self._image_tokens = _image_tokens(processor.tokenizer, model.config)

    def sample(self, prompt: str, grid: Grid, seed: int, on_token: OnToken) -> Tensor:
        """Sample prior tokens, int64 (1, 4 * rows * columns) on the CPU, for a grid of 32x32-pixel cells.

        Each sampled token is upsampled to 2x2 prior tokens. Raises InvalidInput for a prompt that contains image tokens
        or is too long, and for a seed with which the model ends the image early or samples an unusable token.
        """
        ids, grids = self._encode(prompt, grid)
        positions = _positions(ids.shape[1], grids[::-1]).to(self._device)
        tokens = self._generate(ids, positions, seed, on_token)
        image_tokens = torch.tensor(tokens[-grid[0] * grid[1] :])
        if int(image_tokens.max()) >= self._codebook_size:
            raise _unusable(seed, f"the token {int(image_tokens.max())}, for which the transformer has no embedding")
        upsampled = image_tokens.view(grid).repeat_interleave(UPSAMPLING, 0).repeat_interleave(UPSAMPLING, 1)
        return upsampled.reshape(1, -1)

    def _check_template(self) -> None:
        """Check that the chat template renders the prompt. Raises CheckpointError."""
        file = f"processor/{_TEMPLATE_FILE}"
        try:
            (text,) = self._processor.apply_chat_template(_chat(_PROBE), tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{file}: the chat template cannot be rendered: {error}; download it again"
            ) from error
        if _PROBE not in text:
            raise CheckpointError(
                f"{file}: the chat template renders {_PROBE!r} as {text!r}, without the prompt; download it again"
            )

    def _encode(self, prompt: str, grid: Grid) -> tuple[Tensor, list[Grid]]:
        """Token ids (1, tokens) of the chat, and the two grids in the chat: image, then preview."""
        if token := next((token for token in self._image_tokens if token in prompt), None):
            message = f"prompt: {token} is one of the model's image tokens and not allowed; a prompt without it works"
            raise InvalidInput(message, field="prompt")
        rows, columns = grid
        encoded = self._processor.apply_chat_template(
            _chat(prompt),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": False, "target_h": PIXELS * rows, "target_w": PIXELS * columns},
        )
        ids: Tensor = encoded["input_ids"]
        grids = [(height, width) for _, height, width in encoded["image_grid_thw"].tolist()]
        limit = self._config.text_config.max_position_embeddings - sum(height * width for height, width in grids)
        if ids.shape[1] > limit:
            message = f"prompt: {ids.shape[1]} tokens are not at most {limit}; a shorter prompt works"
            raise InvalidInput(message, field="prompt")
        return ids, grids

    def _generate(self, ids: Tensor, positions: Tensor, seed: int, on_token: OnToken) -> list[int]:
        """Sample a token for each of the positions (3, 1, tokens) after the prompt."""
        generator = torch.Generator(self._device).manual_seed(seed)
        cache = DynamicCache(config=self._config.text_config)
        begin, total = ids.shape[1], positions.shape[2] - ids.shape[1]
        seen = slice(0, begin)
        given, sampled = ids.to(self._device), list[int]()
        while True:
            logits = self._logits(given, positions[:, :, seen], cache)
            scores = self._warpers(given, logits)
            given = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
            sampled.append(int(given))
            if sampled[-1] in self._ends:
                raise _unusable(seed, f"an end token after {len(sampled) - 1} of {total} tokens")
            on_token(len(sampled), total)
            if len(sampled) == total:
                return sampled
            seen = slice(begin + len(sampled) - 1, begin + len(sampled))

    def _logits(self, given: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Logits of the next token, float32 (1, vocabulary)."""
        embeds = self._language_model.get_input_embeddings()(given)
        # Positional arguments: the name of the cache argument differs between versions of transformers.
        output = self._language_model(None, None, positions, cache, embeds)
        logits: Tensor = self._lm_head(output.last_hidden_state[:, -1:])
        return logits[:, -1].float()


def load_glm_image_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the language model without its image encoder, which only editing uses. Raises CheckpointError."""
    model = load_pretrained(checkpoint, name, torch.device("cpu"), dtype)
    del model.model.visual, model.model.vqmodel
    return model.to(device)


def load_glm_image_processor(checkpoint: Checkpoint, name: str, *_: object) -> Any:
    """Load the processor with its tokenizer and chat template. Raises CheckpointError, which lists the needed files."""
    try:
        return load_tokenizer(checkpoint, name)
    except CheckpointError as error:
        files = ", ".join(_PROCESSOR_FILES)
        raise CheckpointError(f"{error.message}; {name} needs the files {files}; download them again") from error


def _chat(prompt: str) -> list[Any]:
    """A batch of one chat with the prompt as the user message."""
    return [[{"role": "user", "content": [{"type": "text", "text": prompt}]}]]


def _image_tokens(tokenizer: Any, config: Any) -> tuple[str, ...]:
    """The texts of the image token and its start and end tokens. Raises CheckpointError for a missing token."""
    ids = {
        "image_token_id": config.image_token_id,
        "image_start_token_id": config.image_start_token_id,
        "image_end_token_id": config.image_end_token_id,
    }
    texts: list[str | None] = tokenizer.convert_ids_to_tokens(list(ids.values()))
    for (name, number), text in zip(ids.items(), texts, strict=True):
        if not text:
            raise CheckpointError(
                f"vision_language_encoder/config.json: {name}: {number} is not a token of processor/tokenizer.json; "
                "both files must belong to one model"
            )
    return tuple(filter(None, texts))


def _positions(prompt_tokens: int, grids: Sequence[Grid]) -> Tensor:
    """Positions (time, row, column) of the prompt and the consecutive grids, (3, 1, tokens)."""
    parts = [torch.arange(prompt_tokens).expand(3, -1)]
    start = prompt_tokens
    for rows, columns in grids:
        cells = torch.cartesian_prod(torch.tensor([0]), torch.arange(rows), torch.arange(columns))
        parts.append(cells.T + start)
        start += max(rows, columns)
    return torch.cat(parts, dim=1)[:, None]


def _warpers(settings: Any) -> Any:
    """Logits warpers of the settings in generation_config.json. Raises CheckpointError for unsupported settings."""
    values = settings.to_dict()
    if values.get("_from_model_config"):
        raise CheckpointError(f"{_SETTINGS_FILE}: the file with the sampling settings is missing; download it again")
    for name, neutral in _NEUTRAL.items():
        if values.get(name) not in neutral:
            message = (
                f"{_SETTINGS_FILE}: {name}: {values[name]!r} is not supported; only temperature, top_k and top_p are"
            )
            raise CheckpointError(message)
    temperature, top_k, top_p = (values.get(name) for name in ("temperature", "top_k", "top_p"))
    temperature = _TEMPERATURE if temperature is None else temperature
    top_k = _TOP_K if top_k is None else top_k
    top_p = _TOP_P if top_p is None else top_p
    warpers = LogitsProcessorList()
    try:
        if temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k=top_k))
        if top_p < 1.0:
            warpers.append(TopPLogitsWarper(top_p=top_p))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{_SETTINGS_FILE}: {error}") from error
    return warpers


def _ends(ids: int | list[int] | None) -> frozenset[int]:
    """Ids of the end-of-sequence tokens."""
    return frozenset() if ids is None else frozenset(ids if isinstance(ids, list) else [ids])


def _unusable(seed: int, sampled: str) -> InvalidInput:
    message = f"seed: {seed} is not usable with this prompt, as the model samples {sampled}"
    return InvalidInput(f"{message}; another seed works", field="seed")
