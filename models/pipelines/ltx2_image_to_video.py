"""LTX-2 checkpoints of the class LTX2ImageToVideoPipeline, with the variants of LTX2Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.pipelines.ltx2 import LTX2ImagePipeline, ltx2_variants, register_ltx2_configs
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline


class LTX2ImageToVideoPipeline(LTX2ImagePipeline):
    """Diffusers' LTX2ImageToVideoPipeline."""

    pipeline_name = "LTX2ImageToVideoPipeline"

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Both variants, regardless of the pipeline class in the checkpoint."""
        del checkpoint
        return ltx2_variants()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    register_ltx2_configs(registry, LTX2ImageToVideoPipeline.pipeline_name)


EntryClass = LTX2ImageToVideoPipeline
