"""LTX-Video checkpoints of the class LTXImageToVideoPipeline, with the variants of LTXPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.pipelines.ltx_video import LTXImagePipeline, ltx_video_variants, register_ltx_video_configs
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline


class LTXImageToVideoPipeline(LTXImagePipeline):
    """Diffusers' LTXImageToVideoPipeline."""

    pipeline_name = "LTXImageToVideoPipeline"
    relatives = ("LTXI2V",)

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Both variants, regardless of the pipeline class in the checkpoint."""
        del checkpoint
        return ltx_video_variants()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    register_ltx_video_configs(registry, LTXImageToVideoPipeline.pipeline_name)


EntryClass = LTXImageToVideoPipeline
