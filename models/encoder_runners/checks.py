"""Load-time checks that tokenizers and image processors match their encoders.

Each check runs the tokenizer or processor on a small input. A mismatch would otherwise change every result or, on a
GPU, crash the process.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from common.errors import CheckpointError

# A tokenizer without a vocabulary encodes both texts as unknown tokens.
_PROBES = ("a red apple", "two old stones in the river")
_PROBE_SIZE = (96, 64)


def check_tokenizer(tokenizer_name: str, tokenizer: Any, encoder_name: str, known: int) -> None:
    """Check that the tokenizer has a vocabulary, and that it fits the encoder.

    `known` is the number of the encoder's token embeddings. Raises CheckpointError.
    """
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > known:
        raise CheckpointError(
            f"{tokenizer_name}: {size} tokens are not at most {known}, the embeddings of {encoder_name}; "
            "both modules must belong to one model"
        )
    first, second = (_pieces(tokenizer, text) for text in _PROBES)
    if not first or not second or first == second:
        raise CheckpointError(
            f"{tokenizer_name}: {_PROBES[0]!r} is not encoded by any token of its vocabulary ({size} tokens); "
            f"the vocabulary files are incomplete or belong to another tokenizer: download them again"
        )


def check_vision_processor(processor_name: str, processor: Any, encoder_name: str, encoder: Any) -> None:
    """Check that the processor's image size is the vision encoder's input size. Raises CheckpointError."""
    pixels = processor(images=[Image.new("RGB", _PROBE_SIZE)], return_tensors="pt").pixel_values
    side = encoder.config.image_size
    made = tuple(pixels.shape[-2:])
    if made != (side, side):
        raise CheckpointError(
            f"{processor_name}: {made[0]}x{made[1]} pixels are not {side}x{side}, the input size of {encoder_name}; "
            f"{processor_name}/preprocessor_config.json belongs to another model"
        )


def check_patch_processor(processor_name: str, processor: Any, encoder_name: str, encoder: Any) -> None:
    """Check that the processor's patches match the language model's vision tower. Raises CheckpointError."""
    patches = processor(images=[Image.new("RGB", _PROBE_SIZE)], return_tensors="pt").pixel_values
    vision = encoder.config.vision_config
    taken = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    made = (patches.shape[-1], processor.merge_size)
    if made != (taken, vision.spatial_merge_size):
        raise CheckpointError(
            f"{processor_name}: patches of {made[0]} values with a merge size of {made[1]} are not patches of {taken} "
            f"values with a merge size of {vision.spatial_merge_size}, the input of {encoder_name}; "
            f"{processor_name}/preprocessor_config.json belongs to another model"
        )


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the text that are neither special nor unknown; empty if they decode to whitespace."""
    special = set(tokenizer.all_special_ids)
    pieces = [token for token in tokenizer(text, add_special_tokens=False).input_ids if token not in special]
    return pieces if tokenizer.decode(pieces).strip() else []
