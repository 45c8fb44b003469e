"""Wan 2.1 with a transformer that only takes its time: for benches of all that is around it.

Latents, UniPC and its history are those of the real model, so a checkpoint has the size that it has there.
"""

from __future__ import annotations

from models.pipelines.wan import WanPipeline
from models.registry import Registry


class PacedWanPipeline(WanPipeline):
    """WanPipeline, but for what its transformer does."""

    pipeline_name = "PacedWanPipeline"


def register_configs(registry: Registry) -> None:
    """Name the family's configs."""
    registry.register_configs(
        PacedWanPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="paced_config:PacedWanPipelineConfig",
    )


EntryClass = PacedWanPipeline
