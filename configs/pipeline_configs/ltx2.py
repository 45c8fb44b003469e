"""LTX-2: text or image to a video with audio; guidance on clean latents with up to four branches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.ltx2 import LTX2TransformerConfig
from configs.models.encodings import Connector, PromptText, TextEncoding, sequence_length
from configs.models.fields import ConfigFields
from configs.models.ltx2_connectors import LTX2ConnectorsConfig
from configs.models.vaes.ltx2 import LTX2AudioVAEConfig, LTX2VideoVAEConfig, LTX2VocoderConfig
from configs.pipeline_configs.base import (
    NEGATIVE,
    POSITIVE,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.first_frame import FirstFrameConfig
from configs.pipeline_configs.ltx2_guidance import ISOLATED, PERTURBED, LTX2Guidance
from configs.pipeline_configs.packed import SequenceShift

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 1024
_FRAME_RATE = 24.0
_SHIFT = SequenceShift(base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05)


@dataclass(frozen=True, kw_only=True)
class LTX2PipelineConfig(StandardPipelineConfig):
    """LTX2Pipeline's callbacks. Latents are float32, normalized and not packed, for any dtype of the weights.

    "video" is (B, C, frames, rows, columns), "audio" (B, C, length, mel bins).
    """

    title: ClassVar[str] = "LTX-2 (2.0 and 2.3)"
    deviations: ClassVar[str] = (
        "Prompt enhancement, predicted durations and LTX-2.5 are not supported, as their modules are not loaded. "
        "A single step is rejected, as it is NaN in Diffusers."
    )

    transformer: LTX2TransformerConfig
    connectors: LTX2ConnectorsConfig
    vae: LTX2VideoVAEConfig
    audio_vae: LTX2AudioVAEConfig
    vocoder: LTX2VocoderConfig
    shift: SequenceShift

    part_keywords: ClassVar[Mapping[str, str]] = {"video": "hidden_states", "audio": "audio_hidden_states"}
    branches: ClassVar[tuple[str, ...]] = (POSITIVE, NEGATIVE, PERTURBED, ISOLATED)
    prediction_dtype: ClassVar[torch.dtype | None] = torch.float32
    visual_part: ClassVar[str] = "video"
    has_float32_noise: ClassVar[bool] = True
    audio_part: ClassVar[str | None] = "audio"
    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLLTX2Audio": "models.vaes.ltx2:load_ltx2_audio_vae",
        "AutoencoderKLLTX2Video": "models.vaes.ltx2:load_ltx2_video_vae",
        "Gemma3ForConditionalGeneration": "models.encoder_runners.language_model:load_multimodal_language_model",
        "GemmaTokenizer": "models.loader:load_tokenizer",
        "GemmaTokenizerFast": "models.loader:load_tokenizer",
        "LTX2TextConnectors": "models.loader:load_pretrained",
        "LTX2VideoTransformer3DModel": "models.dits.ltx2_plan:load_ltx2_transformer",
        "LTX2Vocoder": "models.loader:load_pretrained",
        "LTX2VocoderWithBWE": "models.loader:load_pretrained",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"LTX2VideoTransformer3DModel"})

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        extends = checkpoint.modules["vocoder"][1] == "LTX2VocoderWithBWE"
        vocoder = checkpoint.module_config("vocoder")
        config = cls(
            transformer=LTX2TransformerConfig.from_dict("transformer", checkpoint.module_config("transformer")),
            connectors=LTX2ConnectorsConfig.from_dict("connectors", checkpoint.module_config("connectors")),
            vae=LTX2VideoVAEConfig.from_dict("vae", checkpoint.module_config("vae")),
            audio_vae=LTX2AudioVAEConfig.from_dict("audio_vae", checkpoint.module_config("audio_vae")),
            vocoder=LTX2VocoderConfig.from_dict("vocoder", vocoder, extends_bandwidth=extends),
            shift=SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"), _SHIFT),
        )
        config._check_modules(checkpoint)
        return config

    def _check_modules(self, checkpoint: Checkpoint) -> None:
        """Check that the modules' sizes match. Raises CheckpointError."""
        video, audio = self.transformer.video, self.transformer.audio
        text = checkpoint.module_config("text_encoder").get("text_config") or {}
        layers = ConfigFields("text_encoder", text)
        text_size = self.transformer.caption_channels
        spectrogram = self.audio_vae.channels * self.audio_vae.mel_bins
        pairs = {
            "video channels of the transformer and the VAE": (video.in_channels, self.vae.latent_channels),
            "input and output video channels of the transformer": (video.in_channels, video.out_channels),
            "audio channels of the transformer and the audio VAE": (audio.in_channels, self.audio_vae.token_channels),
            "input and output audio channels of the transformer": (audio.in_channels, audio.out_channels),
            "text features for video of the transformer and the connectors": (
                text_size or video.hidden_size,
                self.connectors.video_size,
            ),
            "text features for audio of the transformer and the connectors": (
                text_size or audio.hidden_size,
                self.connectors.audio_size,
            ),
            "layers of the connectors and the text encoder": (
                self.connectors.num_layers,
                layers.integer("num_hidden_layers", 26) + 1,
            ),
            "features of the connectors and the text encoder": (
                self.connectors.caption_channels,
                layers.integer("hidden_size", 2304),
            ),
            "channels of the vocoder and the audio VAE": (self.vocoder.in_channels, spectrogram),
        }
        for entry, (first, second) in pairs.items():
            if first != second:
                raise CheckpointError(f"{checkpoint.name}: {entry}: {first} is not {second}; both must be equal")

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """Hidden states of all Gemma layers, which the connectors map to text for video and for audio."""
        gemma = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=_stripped_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=_all_layers,
            masked=True,
            padding_side="left",
            connector=Connector(module="connectors", connect=self._connect),
        )
        return (gemma,)

    def _connect(self, connectors: Any, hidden_states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Run the connectors; returns the text keywords, without a mask if registers replace padding."""
        video, audio, text_mask = connectors(hidden_states, mask, padding_side="left")
        texts = {"encoder_hidden_states": video, "audio_encoder_hidden_states": audio}
        return texts if self.connectors.registers is not None else texts | {"encoder_attention_mask": text_mask}

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Text is padded to 1024 tokens by default."""
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.connectors.video_size),
            "audio_encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.connectors.audio_size),
        }
        masks = {} if self.connectors.registers else {"encoder_attention_mask": (1, MAX_SEQUENCE_LENGTH)}
        return shapes | masks

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance of either part is enabled; an unset negative prompt is empty."""
        del prompt
        return LTX2Guidance.of(sampling).wants_negative

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """Shapes of video, then audio; the audio has the duration of the requested frames."""
        side, frames = self.vae.spatial_factor, self.vae.latent_frames(canvas.num_frames)
        length = self.audio_vae.latent_length(canvas.num_frames, canvas.frame_rate or _FRAME_RATE)
        return {
            "video": (batch, self.vae.latent_channels, frames, canvas.height // side, canvas.width // side),
            "audio": (batch, self.audio_vae.latent_channels, length, self.audio_vae.latent_bins),
        }

    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """The request's sigmas, or evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or np.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, canvas: Canvas) -> float | None:
        """The shift from the number of video tokens; audio has the same schedule."""
        *_, frames, rows, columns = self.raw_latent_shapes(canvas, 1)["video"]
        return self.shift.mu(frames * rows * columns)

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The schedule's timesteps, in [0, 1000]."""
        return timesteps

    def branches_of(self, sampling: Sampling, *, has_negative: bool) -> tuple[str, ...]:
        """The branches of enabled guidance, except a perturbed branch that would skip no block."""
        guidance = LTX2Guidance.of(sampling)
        wanted = {
            POSITIVE: True,
            NEGATIVE: has_negative,
            PERTURBED: guidance.wants_perturbed and bool(self._skipped(guidance)),
            ISOLATED: guidance.wants_isolated,
        }
        return tuple(branch for branch in self.branches if wanted[branch])

    def branch_flags(self, branch: str, sampling: Sampling) -> Mapping[str, Hashable]:
        """Flags for blocks without self-attention, and for modalities without cross-modal attention."""
        if branch == PERTURBED:
            return {"spatio_temporal_guidance_blocks": self._skipped(LTX2Guidance.of(sampling))}
        return {"isolate_modalities": True} if branch == ISOLATED else {}

    def _skipped(self, guidance: LTX2Guidance) -> tuple[int, ...]:
        """Existing blocks whose self-attention the perturbed branch skips."""
        blocks = range(self.transformer.num_layers if self.transformer.skips_attention else 0)
        return tuple(sorted(set(guidance.blocks).intersection(blocks)))

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """The frame rate in Hz, for the positions."""
        del embeds, shapes
        frame_rate = sampling.params.get("conditioning_frame_rate", _FRAME_RATE)
        return {"fps": torch.tensor([frame_rate], dtype=torch.float32)}

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Apply guidance to the predicted clean latents of each part, and convert the result to a velocity."""
        guided: dict[str, Tensor] = {}
        for part, scales in LTX2Guidance.of(sampling).parts.items():
            x, sigma = latents[part], step.sigma[part]
            clean = {branch: x - each[part] * sigma for branch, each in predictions.items()}
            guided[part] = (x - scales.guided(clean)) / sigma
        return guided

    @property
    def sampling_rate(self) -> int:
        """The vocoder's sampling rate in Hz."""
        return self.vocoder.sampling_rate

    def num_frames(self, canvas: Canvas) -> int:
        """Frames rounded down to whole latent frames."""
        return self.vae.whole_frames(canvas.num_frames)

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Unchanged: the VAEs denormalize with statistics in their weights."""
        return raw

    def saved_latents(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...], decoder: Any) -> Tensor:
        """Denormalized latents."""
        del part, raw_latent_shape
        raw: Tensor = decoder.denormalized(latents)
        return raw


@dataclass(frozen=True, kw_only=True)
class LTX2ImageToVideoPipelineConfig(FirstFrameConfig, LTX2PipelineConfig):
    """LTX2ImageToVideoPipeline's callbacks: the image is the first latent frame."""

    resampling: ClassVar[Literal["lanczos", "bilinear"]] = "bilinear"

    def recompression(self, sampling: Sampling) -> int:
        """The request's image_crf."""
        factor = sampling.params.get("image_crf", 0)
        assert isinstance(factor, int), "LTX2ImageToVideoSamplingParams validates it"
        return factor

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Add the keyword use_cross_timestep from the request."""
        crosses = bool(sampling.params.get("use_cross_timestep", True))
        rate = super().prepare_pos_cond_kwargs(embeds, shapes, sampling)
        return {**rate, "use_cross_timestep": torch.tensor([crosses])}

    def before_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Restore the image as the first latent frame, because guidance depends on that frame."""
        del step
        return self.with_first_frame(latents, conditions)


def _stripped_prompt(prompt: Prompt) -> PromptText:
    return PromptText(field="prompt", text=prompt.prompt.strip())


def _all_layers(output: Any, _: Tensor) -> Tensor:
    """Hidden states of embeddings and all layers, (B, T, size, layers)."""
    return torch.stack(output.hidden_states, dim=-1)
