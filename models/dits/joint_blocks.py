"""Runs the blocks and the last norm of DiTs with text and image segments."""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.layers.joint_attention import ImageModulation
from models.layers.norms import LayerNormScaleShift, Residual
from models.layers.step_cache import CacheUse, run_blocks
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments


def run_joint_blocks(
    image_BID: Tensor,
    text_BTD: Tensor,
    modulation_BM: Tensor,
    rotation: Rotation,
    blocks: Iterable[nn.Module],
    final_norm: LayerNormScaleShift,
    use: CacheUse | None,
    reference: tuple[int, Tensor] | None = None,
) -> Tensor:
    """Image tokens (B, I, D) after all blocks and the final norm.

    `modulation_BM` are vectors of size D, in the order in which the blocks read them; the last two are the scale and
    shift of the final norm. `reference` is for reference images with a separate timestep: the number of their tokens,
    which are the last image tokens, and their modulations (B, M).
    """
    size = final_norm.size
    if reference is None:
        modulations = image_modulations(_vectors(modulation_BM, size))
        return run_modulated_blocks(image_BID, text_BTD, modulations, rotation, blocks, final_norm, use)
    length, reference_modulation = reference
    modulations = list(zip(_vectors(modulation_BM, size), _vectors(reference_modulation, size), strict=True))
    return run_modulated_blocks(image_BID, text_BTD, modulations, rotation, blocks, final_norm, use, length)


def run_modulated_blocks(
    image_BID: Tensor,
    text_BTD: Tensor,
    modulations: Sequence[ImageModulation],
    rotation: Rotation,
    blocks: Iterable[nn.Module],
    final_norm: LayerNormScaleShift,
    use: CacheUse | None,
    reference_tokens: int = 0,
) -> Tensor:
    """Run blocks as run_joint_blocks() does; several blocks may share tensors of the list `modulations`.

    With two tensors in each of `modulations`, the last `reference_tokens` of the image tokens are the third segment.
    """
    text, image = text_BTD.shape[1], image_BID.shape[1]
    lengths = (text, image) if len(modulations[0]) == 1 else (text, image - reference_tokens, reference_tokens)
    # All blocks share one iterator, and each block takes its modulations from it. It iterates over a tuple, because
    # torch.compile cannot trace the iterator of a list.
    inputs: dict[str, object] = {
        "modulations": iter(tuple(modulations)),
        "rotation": rotation,
        "segments": TokenSegments(lengths),
    }
    residual = Residual(torch.cat((text_BTD, image_BID), dim=1))
    residual = run_blocks(residual, [partial(block, **inputs) for block in blocks], use)
    scale, shift = (SegmentVectors.same(each[0]) for each in modulations[-2:])
    _, normed = final_norm.after(residual, scale, shift)
    return normed[:, text:]


def image_modulations(vectors: Iterable[Tensor]) -> list[ImageModulation]:
    """Wrap each vector (B, D) as a modulation without a tensor for reference images."""
    return [(vector,) for vector in vectors]


def _vectors(modulation_BM: Tensor, size: int) -> tuple[Tensor, ...]:
    return modulation_BM.chunk(modulation_BM.shape[1] // size, dim=1)


def joint_residual_elements(image_BIC: Tensor, text_BTD: Tensor) -> int:
    """Number of elements of the residual stream (B, T + I, D)."""
    batch, _, size = text_BTD.shape
    return batch * (text_BTD.shape[1] + image_BIC.shape[1]) * size
