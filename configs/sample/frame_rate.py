"""The frame rate for conditioning the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from common.artifacts import Canvas, Prompt, Sampling


def with_conditioning_frame_rate(
    made: Mapping[str, Prompt | Canvas | Sampling], frame_rate: float
) -> dict[str, Prompt | Canvas | Sampling]:
    """Add `conditioning_frame_rate` (Hz) to the sampling artifact; `made` maps slots to artifacts."""
    sampling = made["sampling"]
    assert isinstance(sampling, Sampling), "SamplingParams.artifacts() has one artifact per slot"
    params = {**sampling.params, "conditioning_frame_rate": frame_rate}
    return {**made, "sampling": replace(sampling, params=params)}
