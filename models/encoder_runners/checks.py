"""Checks that tokenizers and image processors fit their encoders, made when a model loads.

Each check runs the tokenizer or processor once: what it lacks would otherwise change every result, or end the process
on a GPU.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from common.errors import CheckpointError

# Two texts of ordinary words. Tokenizers without a vocabulary encode both as unknown tokens.
_PROBES = ("a red apple", "two old stones in the river")
_PROBE_SIZE = (96, 64)


def check_tokenizer(tokenizer_name: str, tokenizer: Any, encoder_name: str, known: int) -> None:
    """Refuse a tokenizer without a vocabulary, and tokens that the encoder has no embedding for: `known` it has."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > known:
        raise CheckpointError(f"{tokenizer_name} has {size} tokens, but {encoder_name} knows {known}")
    first, second = (_pieces(tokenizer, text) for text in _PROBES)
    if not first or not second or first == second:
        raise CheckpointError(
            f"{tokenizer_name} encodes {_PROBES[0]!r} without a piece of its vocabulary ({size} tokens); "
            f"its vocabulary files are incomplete or belong to another tokenizer: download them again"
        )


def check_vision_processor(processor_name: str, processor: Any, encoder_name: str, encoder: Any) -> None:
    """Refuse an image processor whose images have another size than the vision encoder takes."""
    pixels = processor(images=[Image.new("RGB", _PROBE_SIZE)], return_tensors="pt").pixel_values
    side = encoder.config.image_size
    made = tuple(pixels.shape[-2:])
    if made != (side, side):
        raise CheckpointError(
            f"{processor_name} makes images of {made[0]}x{made[1]} pixels, but {encoder_name} takes {side}x{side}; "
            f"{processor_name}/preprocessor_config.json is that of another model"
        )


def check_patch_processor(processor_name: str, processor: Any, encoder_name: str, encoder: Any) -> None:
    """Refuse an image processor whose patches are not those of the language model's vision tower."""
    patches = processor(images=[Image.new("RGB", _PROBE_SIZE)], return_tensors="pt").pixel_values
    vision = encoder.config.vision_config
    taken = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    made = (patches.shape[-1], processor.merge_size)
    if made != (taken, vision.spatial_merge_size):
        raise CheckpointError(
            f"{processor_name} makes patches of {made[0]} values and merges {made[1]} a side, but {encoder_name} takes "
            f"{taken} and {vision.spatial_merge_size}; {processor_name}/preprocessor_config.json is that of another "
            f"model"
        )


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the text that are neither special nor unknown; none where they stand for spaces alone."""
    special = set(tokenizer.all_special_ids)
    pieces = [token for token in tokenizer(text, add_special_tokens=False).input_ids if token not in special]
    return pieces if tokenizer.decode(pieces).strip() else []
