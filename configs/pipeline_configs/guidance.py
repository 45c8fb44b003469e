"""Functions for guidance that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from configs.pipeline_configs.base import NEGATIVE, POSITIVE, Parts

if TYPE_CHECKING:
    from common.artifacts import Prompt, Sampling


def wants_guidance(sampling: Sampling) -> bool:
    """Whether `guidance_scale` enables classifier-free guidance: a scale above 1."""
    return (sampling.guidance_scale or 0.0) > 1.0


def wants_true_guidance(prompt: Prompt, sampling: Sampling) -> bool:
    """Whether `true_cfg_scale` enables guidance: a scale above 1 and a (possibly empty) negative prompt."""
    return prompt.negative_prompt is not None and (sampling.true_cfg_scale or 1.0) > 1.0


def classifier_free(predictions: Mapping[str, Parts], part: str, scale: float) -> Tensor:
    """Classifier-free guidance of a latent part, from the positive and negative branches' predictions."""
    positive, negative = predictions[POSITIVE][part], predictions[NEGATIVE][part]
    return negative + scale * (positive - negative)


def rescaled(guided: Tensor, unguided: Tensor, fraction: float) -> Tensor:
    """Rescale a fraction of a guided prediction to the standard deviation of the unguided prediction.

    Both are (B, ...); deviations are per row. A fraction of 0 returns `guided` unchanged.
    """
    if fraction <= 0:
        return guided
    other = guided * (_deviation(unguided) / _deviation(guided))
    return fraction * other + (1 - fraction) * guided


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each row of a batch, (B, 1, ...)."""
    return x.std(dim=list(range(1, x.ndim)), keepdim=True)
