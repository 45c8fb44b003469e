"""HunyuanVideo: prompt encoded by Llama in a template and by CLIP (pooled); guidance is an embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from configs.models.dits.hunyuan_video import PATCH, HunyuanVideoTransformerConfig
from configs.models.encodings import (
    Template,
    TextEncoding,
    hidden_states,
    pooled_output,
    second_prompt,
    sequence_length,
    whole_prompt,
)
from configs.models.fields import ConfigFields
from configs.models.vaes.hunyuan_video import AutoencoderKLHunyuanVideoConfig
from configs.pipeline_configs.base import (
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.guidance import classifier_free, wants_true_guidance
from configs.pipeline_configs.packed import check_channels, check_text_size

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 256
CLIP_LENGTH = 77
TYPICAL_TOKENS = 64
"""Number of tokens of a typical prompt, for warm-up. Text is not padded."""

TEMPLATE = Template(
    before="<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    after="<|eot_id|>",
    skipped=95,
)


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoPipelineConfig(StandardPipelineConfig):
    """HunyuanVideoPipeline's callbacks. Latents (B, channels, frames, rows, columns) are float32 and not packed."""

    title: ClassVar[str] = "HunyuanVideo"
    deviations: ClassVar[str] = (
        "CLIP reads `prompt_2`, as documented; Diffusers ignores it. Frames are rounded to whole latent frames, with "
        "a warning."
    )

    transformer: HunyuanVideoTransformerConfig
    vae: AutoencoderKLHunyuanVideoConfig

    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLHunyuanVideo": "models.vaes.hunyuan_video:load_hunyuan_video_vae",
        "HunyuanVideoTransformer3DModel": "models.dits.hunyuan_video_plan:load_hunyuan_video_transformer",
        "LlamaModel": "models.encoder_runners.language_model:load_language_model",
        "LlamaTokenizer": "models.loader:load_auto_tokenizer",
        "LlamaTokenizerFast": "models.loader:load_auto_tokenizer",
        "PreTrainedTokenizerFast": "models.loader:load_auto_tokenizer",
        "TokenizersBackend": "models.loader:load_auto_tokenizer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"HunyuanVideoTransformer3DModel"})
    part_keywords: ClassVar[Mapping[str, str]] = {"video": "hidden_states"}
    visual_part: ClassVar[str] = "video"
    has_float32_noise: ClassVar[bool] = True

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = HunyuanVideoTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLHunyuanVideoConfig.from_dict("vae", checkpoint.module_config("vae"))
        check_channels(transformer.in_channels, transformer.out_channels, vae.latent_channels)
        sizes = {"text_encoder": transformer.text_embed_dim, "text_encoder_2": transformer.pooled_projection_dim}
        for encoder, expected in sizes.items():
            size = ConfigFields(encoder, checkpoint.module_config(encoder)).integer("hidden_size", expected)
            check_text_size(size, encoder, expected)
        return cls(transformer=transformer, vae=vae)

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """Hidden states of Llama's third-to-last layer after the template's prefix; CLIP's pooled output."""
        llama = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=hidden_states(-3, skipped=TEMPLATE.skipped),
            template=TEMPLATE,
        )
        clip = TextEncoding(
            keyword="pooled_projections",
            tokenizer="tokenizer_2",
            encoder="text_encoder_2",
            text=second_prompt,
            max_length=_clip_length,
            output=pooled_output,
        )
        return (llama, clip)

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether true guidance is enabled: a scale above 1 and a (possibly empty) negative prompt."""
        return wants_true_guidance(prompt, sampling)

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, frames, rows, columns)."""
        vae = self.vae
        rows, columns = canvas.height // vae.spatial_factor, canvas.width // vae.spatial_factor
        return {"video": (batch, vae.latent_channels, vae.latent_frames(canvas.num_frames), rows, columns)}

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or evenly spaced from 1 to 1/steps."""
        return sampling.sigmas or np.linspace(1.0, 0.0, sampling.num_inference_steps + 1)[:-1].tolist()

    def mu(self, canvas: Canvas) -> None:
        """None: the scheduler's shift is fixed."""
        del canvas

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes for a typical prompt."""
        return {
            "encoder_hidden_states": (1, TYPICAL_TOKENS, self.transformer.text_embed_dim),
            "pooled_projections": (1, self.transformer.pooled_projection_dim),
        }

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Guidance for distilled models, and positions (frame, row, column) of the video's tokens."""
        del embeds
        batch, _, frames, rows, columns = shapes["video"]
        guidance = None
        if self.transformer.guidance_embeds:
            guidance = torch.full((batch,), sampling.guidance_scale or 0.0, dtype=torch.float32)
        axes = (torch.arange(size, dtype=torch.float32) for size in (frames, rows // PATCH, columns // PATCH))
        return {"guidance": guidance, "video_ids": torch.cartesian_prod(*axes)}

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The schedule's timesteps, in [0, 1000]."""
        return timesteps

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with `true_cfg_scale`."""
        del latents, step
        return {"video": classifier_free(predictions, "video", sampling.true_cfg_scale or 1.0)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo scaling."""
        return raw / self.vae.scaling_factor


def _clip_length(_: Prompt) -> int:
    return CLIP_LENGTH
