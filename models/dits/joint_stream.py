"""The blocks of DiTs with text and image segments, between their first and their last projection."""

# ruff: noqa: N803  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.layers.norms import LayerNormScaleShift, Residual
from models.layers.step_cache import CacheUse, through_blocks
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments


def through_joint_blocks(
    image_BID: Tensor,
    text_BTD: Tensor,
    modulation_BM: Tensor,
    rotation: Rotation,
    blocks: Iterable[nn.Module],
    final_norm: LayerNormScaleShift,
    use: CacheUse | None,
    last: tuple[int, Tensor] | None = None,
) -> Tensor:
    """The image tokens (B, I, D) after all blocks and the last norm.

    Each block takes its share of the modulations, vectors of size D, in order; the last two are the norm's. `last` are
    the length of a segment at the end of the image tokens, and its modulations in the blocks, (B, M) too.
    """
    size = final_norm.size
    parts = _vectors(modulation_BM, size)
    if last is None:
        return through_modulated_blocks(image_BID, text_BTD, parts, rotation, blocks, final_norm, use)
    own = (last[0], _vectors(last[1], size))
    return through_modulated_blocks(image_BID, text_BTD, parts, rotation, blocks, final_norm, use, own)


def through_modulated_blocks(
    image_BID: Tensor,
    text_BTD: Tensor,
    parts: Sequence[Tensor],
    rotation: Rotation,
    blocks: Iterable[nn.Module],
    final_norm: LayerNormScaleShift,
    use: CacheUse | None,
    last: tuple[int, Sequence[Tensor]] | None = None,
) -> Tensor:
    """The same, with the modulations (B, D) each; blocks may share vectors."""
    text, image = text_BTD.shape[1], image_BID.shape[1]
    given: dict[str, object] = {"parts": iter(parts), "rotation": rotation, "segments": TokenSegments((text, image))}
    if last is not None:
        length, own = last
        given |= {"segments": TokenSegments((text, image - length, length)), "last": iter(own)}
    residual = Residual(torch.cat((text_BTD, image_BID), dim=1))
    residual = through_blocks(residual, [partial(block, **given) for block in blocks], use)
    scale, shift = (SegmentVectors.same(part) for part in parts[-2:])
    _, normed = final_norm.after(residual, scale, shift)
    return normed[:, text:]


def _vectors(modulation_BM: Tensor, size: int) -> tuple[Tensor, ...]:
    return modulation_BM.chunk(modulation_BM.shape[1] // size, dim=1)


def joint_residual_elements(image_BIC: Tensor, text_BTD: Tensor) -> int:
    """Elements of the residual stream (B, T + I, D)."""
    batch, _, size = text_BTD.shape
    return batch * (text_BTD.shape[1] + image_BIC.shape[1]) * size
