"""Architecture of Diffusers' LTX2TextConnectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class LTX2ConnectorsConfig:
    """LTX2TextConnectors' config.json.

    The connectors map the hidden states of all layers of a language model to text features for video and for audio.
    `caption_channels` is the hidden size of the language model; `num_layers` includes the embeddings. `video_size` and
    `audio_size` are the hidden sizes of the results. `registers` is the number of learned tokens, repeated to replace
    padding; None: padding remains and is masked.
    """

    caption_channels: int
    num_layers: int
    video_size: int
    audio_size: int
    registers: int | None

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        sizes, registers = {}, {}
        for part in ("video", "audio"):
            heads = fields.integer(f"{part}_connector_num_attention_heads", 30)
            sizes[part] = heads * fields.integer(f"{part}_connector_attention_head_dim", 128)
            registers[part] = _registers(fields, f"{part}_connector_num_learnable_registers")
        if registers["video"] != registers["audio"]:
            message = f"{registers['video']}, the value for video; both share one mask"
            raise fields.error("audio_connector_num_learnable_registers", message)
        return cls(
            caption_channels=fields.integer("caption_channels", 3840),
            num_layers=fields.integer("text_proj_in_factor", 49),
            video_size=sizes["video"],
            audio_size=sizes["audio"],
            registers=registers["video"],
        )


def _registers(fields: ConfigFields, name: str) -> int | None:
    """Read an optional integer: null means None, a missing entry means 128."""
    return None if name in fields.values and fields.values[name] is None else fields.integer(name, 128)
