"""The frame rate that a denoiser is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from common.artifacts import Canvas, Prompt, Sampling


def with_conditioning_frame_rate(
    made: Mapping[str, Prompt | Canvas | Sampling], frame_rate: float
) -> dict[str, Prompt | Canvas | Sampling]:
    """Artifacts by slot whose sampling has the rate, in frames a second, as `conditioning_frame_rate`."""
    sampling = made["sampling"]
    assert isinstance(sampling, Sampling), "SamplingParams.artifacts() puts each in its slot"
    params = {**sampling.params, "conditioning_frame_rate": frame_rate}
    return {**made, "sampling": replace(sampling, params=params)}
