"""Architecture of the causal Wan DiT, which denoises blocks of frames sequentially."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from common.errors import CheckpointError
from configs.models.dits.wan import WanTransformerConfig
from configs.models.fields import ConfigFields

CLASS_NAME = "CausalWanTransformer3DModel"


@dataclass(frozen=True, kw_only=True)
class CausalWanTransformerConfig(WanTransformerConfig):
    """CausalWanTransformer3DModel's config.json; the defaults of `own_entries` are Self Forcing's.

    All sizes are in latent frames. A block attends to itself and to all previous frames. With `local_attn_size`, a
    block attends to a window of `local_attn_size` frames: the first `sink_size` frames of the video, and the latest
    frames, which include the block itself. Without a window, a video has at most `sliding_window_num_frames` frames.
    """

    own_entries = (
        "num_frames_per_block",
        "local_attn_size",
        "sink_size",
        "sliding_window_num_frames",
        "independent_first_frame",
    )

    num_frames_per_block: int = 3
    local_attn_size: int | None = None
    sink_size: int = 0
    sliding_window_num_frames: int = 21

    @property
    def max_frames(self) -> int | None:
        """Maximum number of latent frames of a video; None: unlimited, with a sliding window."""
        return self.sliding_window_num_frames if self.local_attn_size is None else None

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError, also for a Wan DiT without causal attention.

        A causal DiT has the causal class name, as in published checkpoints, or the entry num_frames_per_block, as in
        checkpoints of FastVideo's converter.
        """
        if values.get("_class_name") != CLASS_NAME and "num_frames_per_block" not in values:
            raise CheckpointError(
                f"{module}/config.json: _class_name: {values.get('_class_name')!r} is not {CLASS_NAME!r}, and "
                "num_frames_per_block is missing; a causal Wan has one of the two"
            )
        fields = ConfigFields(module, values)
        fields.only("independent_first_frame", False)
        window = values.get("local_attn_size")
        config = replace(
            super().from_dict(module, values),
            num_frames_per_block=fields.integer("num_frames_per_block", cls.num_frames_per_block),
            local_attn_size=None if window in (None, -1) else fields.integer("local_attn_size", 1),
            sink_size=fields.integer("sink_size", cls.sink_size, minimum=0),
            sliding_window_num_frames=fields.integer("sliding_window_num_frames", cls.sliding_window_num_frames),
        )
        config._check(fields)
        return config

    def _check(self, fields: ConfigFields) -> None:
        if self.patch_size[0] != 1:
            raise fields.error("patch_size", "a patch of one frame; blocks consist of whole frames")
        if self.image_dim is not None:
            raise fields.error("image_dim", "null; a causal Wan reads only text")
        block = self.num_frames_per_block
        if self.local_attn_size is None:
            if self.sliding_window_num_frames < block:
                raise fields.error("sliding_window_num_frames", f"at least {block}, the frames of a block")
        elif self.local_attn_size - self.sink_size < block:
            minimum = block + self.sink_size
            raise fields.error("local_attn_size", f"at least {minimum}, the frames of a block and of the sink")
