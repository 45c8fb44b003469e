"""Wan 2.1 with a sleeping transformer, to benchmark everything except the transformer.

Latents, UniPC and its history are the real ones, so that step checkpoints have their real size.
"""

from __future__ import annotations

from models.pipelines.wan import WanPipeline
from models.registry import Registry


class PacedWanPipeline(WanPipeline):
    """WanPipeline with a sleeping transformer."""

    pipeline_name = "PacedWanPipeline"


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        PacedWanPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="paced_config:PacedWanPipelineConfig",
    )


EntryClass = PacedWanPipeline
