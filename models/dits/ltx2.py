"""The LTX-2 DiT: self-attention of video and of audio, cross-attention to text and to each other.

Shapes: N steps, B batch, F frames, h rows and w columns of video latents, S = F * h * w video tokens, L audio tokens, M
mel bins of an audio latent, C channels, T text tokens, D hidden size of a modality. Parameter names are the
checkpoint's.

In image-to-video the tokens of the first latent frame have a separate timestep: they are the first of two token
segments. A guidance branch may skip the self-attention of some blocks, or the cross-attention between the modalities.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from configs.models.dits.ltx2 import LTX2ModalityConfig, LTX2TransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.ltx2_blocks import (
    EXCHANGE,
    LTX2VideoTransformerBlock,
    Modalities,
    ModalityInputs,
    SegmentRows,
    StepRows,
    block_rows,
    run_both_modalities,
)
from models.dits.ltx2_positions import audio_positions, video_positions
from models.layers.embeddings import TextProjection
from models.layers.head_rotary import head_rotation
from models.layers.norms import LayerNormScaleShift, Residual
from models.layers.step_cache import CacheUse
from models.layers.time_modulation import TimeModulation
from models.rotation import HeadRotation
from models.token_segments import TokenSegments

VIDEO, FIRST_FRAME, AUDIO = "video", "first_frame", "audio"
"""Token segments with separate modulations; keys of the result of predict_tokens()."""

MASKED = -10000.0
"""Value added to the attention scores of masked text tokens."""

_OUTPUT_NORM_EPS = 1e-6


class LTX2VideoTransformer3DModel(DiffusionTransformer):
    """Predicts the velocities of video and audio latents."""

    def __init__(self, config: LTX2TransformerConfig) -> None:
        super().__init__()
        self.config = config
        video, audio = config.video, config.audio
        size, audio_size = video.hidden_size, audio.hidden_size
        self.proj_in = nn.Linear(video.in_channels, size)
        self.audio_proj_in = nn.Linear(audio.in_channels, audio_size)
        captions = config.caption_channels
        self.caption_projection = TextProjection(captions, size) if captions else None
        self.audio_caption_projection = TextProjection(captions, audio_size) if captions else None
        self.time_embed = TimeModulation(size, block_rows(video))
        self.audio_time_embed = TimeModulation(audio_size, block_rows(audio))
        self.av_cross_attn_video_scale_shift = TimeModulation(size, EXCHANGE)
        self.av_cross_attn_audio_scale_shift = TimeModulation(audio_size, EXCHANGE)
        self.av_cross_attn_video_a2v_gate = TimeModulation(size, 1)
        self.av_cross_attn_audio_v2a_gate = TimeModulation(audio_size, 1)
        self.prompt_adaln = TimeModulation(size, 2) if config.modulates_text else None
        self.audio_prompt_adaln = TimeModulation(audio_size, 2) if config.modulates_text else None
        self.transformer_blocks = nn.ModuleList(LTX2VideoTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = LayerNormScaleShift(size, _OUTPUT_NORM_EPS)
        self.audio_norm_out = LayerNormScaleShift(audio_size, _OUTPUT_NORM_EPS)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, size))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(2, audio_size))
        self.proj_out = nn.Linear(size, video.out_channels)
        self.audio_proj_out = nn.Linear(audio_size, audio.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        fps: Tensor,
        encoder_attention_mask: Tensor | None = None,
        use_cross_timestep: Tensor | None = None,
        spatio_temporal_guidance_blocks: Collection[int] = (),
        isolate_modalities: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Velocities of hidden_states (B, C, F, h, w) and audio_hidden_states (B, C, L, M), in their shapes.

        - timestep: (B,) in [0, 1000], or (B, 2): the first latent frame's timestep, then the other frames' timestep.
        - encoder_hidden_states and audio_encoder_hidden_states: text for video and for audio, (B, T, caption_channels);
          (B, T, D) in models without caption projections.
        - encoder_attention_mask: (B, T), 1 for text and 0 for padding; for both modalities.
        - fps: frames per second, (1,).
        - use_cross_timestep: see prepare(). For the other keywords, see predict().
        """
        prepared = self.prepare(
            timestep[None],
            encoder_hidden_states,
            audio_encoder_hidden_states,
            fps,
            encoder_attention_mask,
            use_cross_timestep,
        )
        predictions = self.predict(
            hidden_states,
            audio_hidden_states,
            use=None,
            spatio_temporal_guidance_blocks=spatio_temporal_guidance_blocks,
            isolate_modalities=isolate_modalities,
            **prepared.inputs(0),
        )
        return predictions["hidden_states"], predictions["audio_hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        fps: Tensor,
        encoder_attention_mask: Tensor | None = None,
        use_cross_timestep: Tensor | None = None,
    ) -> Prepared:
        """Modulations of each modality (N, B, rows, D), float32, for timesteps (N, B); projected text.

        For timesteps (N, B, 2) of two segments, "first_rows" modulate the first latent frame, and "video_rows" the
        other frames. `use_cross_timestep` is bool (1,). True or None: the audio's timestep modulates the
        cross-attention between the first frame and the audio; False: the first frame's timestep does.
        """
        own_NB = timesteps[..., -1] if timesteps.ndim == 3 else timesteps
        steps = {"video_rows": self._video_rows(own_NB, own_NB), "audio_rows": self._audio_rows(own_NB)}
        if timesteps.ndim == 3:
            first_NB = timesteps[..., 0]
            crossed = own_NB if use_cross_timestep is None else torch.where(use_cross_timestep, own_NB, first_NB)
            steps["first_rows"] = self._video_rows(first_NB, crossed)
        constants = {"text": encoder_hidden_states, "audio_text": audio_encoder_hidden_states, "fps": fps}
        if self.caption_projection is not None and self.audio_caption_projection is not None:
            constants["text"] = self.caption_projection(encoder_hidden_states)
            constants["audio_text"] = self.audio_caption_projection(audio_encoder_hidden_states)
        if encoder_attention_mask is not None:
            mask = encoder_attention_mask.to(encoder_hidden_states.dtype)
            constants["text_mask"] = ((1 - mask) * MASKED)[:, None, None]
        return Prepared(steps, constants)

    def _video_rows(self, time_NB: Tensor, cross_time_NB: Tensor) -> Tensor:
        """Modulations (N, B, rows, D) in StepRows' order: blocks, exchange, gate, output, and text if present."""
        modulate = (self.time_embed, self.av_cross_attn_video_scale_shift, self.av_cross_attn_video_a2v_gate)
        return self._rows(*modulate, self.prompt_adaln, time_NB, cross_time_NB)

    def _audio_rows(self, time_NB: Tensor) -> Tensor:
        modulate = (self.audio_time_embed, self.av_cross_attn_audio_scale_shift, self.av_cross_attn_audio_v2a_gate)
        return self._rows(*modulate, self.audio_prompt_adaln, time_NB, time_NB)

    def _rows(
        self,
        blocks: TimeModulation,
        exchange: TimeModulation,
        gate: TimeModulation,
        text: TimeModulation | None,
        time_NB: Tensor,
        cross_time_NB: Tensor,
    ) -> Tensor:
        time, cross_time = time_NB.flatten(), cross_time_NB.flatten()
        rows, embedding = blocks(time)
        parts = [rows, exchange(cross_time)[0], gate(cross_time * self.config.gate_timestep_factor)[0], embedding]
        if text is not None:
            parts.append(text(time)[0])
        joined = torch.cat(parts, dim=1)
        return joined.view(*time_NB.shape, *joined.shape[1:])

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        video_rows: Tensor,
        audio_rows: Tensor,
        text: Tensor,
        audio_text: Tensor,
        fps: Tensor,
        text_mask: Tensor | None = None,
        first_rows: Tensor | None = None,
        spatio_temporal_guidance_blocks: Collection[int] = (),
        isolate_modalities: bool = False,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocities of both latents, with the modulations (B, rows, D) of a step.

        `first_rows` modulate the first latent frame; None: `video_rows` modulate all frames. Static flags of a branch:
        in `spatio_temporal_guidance_blocks` (STG), the values replace the output of self-attention; with
        `isolate_modalities`, video and audio do not attend to each other.
        """
        _, _, *grid = hidden_states.shape
        positions = video_positions(self.config, grid, fps)
        x_BSD = self.proj_in(hidden_states.flatten(2).transpose(1, 2))
        audio_BLD = self.audio_proj_in(audio_hidden_states.transpose(1, 2).flatten(2))
        frame = 0 if first_rows is None else math.prod(grid[1:])
        first, rest = slice(0, frame), slice(frame, None)
        segments = self.predict_tokens(
            x_BSD[:, rest],
            positions[rest],
            audio_BLD,
            video_rows,
            audio_rows,
            text,
            audio_text,
            text_mask,
            first_BSD=x_BSD[:, first] if frame else None,
            first_positions=positions[first] if frame else None,
            first_rows=first_rows,
            skipped=spatio_temporal_guidance_blocks,
            is_isolated=isolate_modalities,
            use=use,
        )
        video = torch.cat([segments[name] for name in (FIRST_FRAME, VIDEO) if name in segments], dim=1)
        audio = segments[AUDIO]
        return {
            "hidden_states": video.transpose(1, 2).reshape(len(video), -1, *grid),
            "audio_hidden_states": audio.view(*audio.shape[:2], -1, audio_hidden_states.shape[3]).transpose(1, 2),
        }

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of both residual streams: video and audio tokens."""
        del constants
        video, audio = latents["hidden_states"], latents["audio_hidden_states"]
        tokens = math.prod(video.shape[2:]) * self.norm_out.size + audio.shape[2] * self.audio_norm_out.size
        return len(video) * tokens

    @entry_point
    def predict_tokens(
        self,
        x_BSD: Tensor,
        positions: Tensor,
        audio_BLD: Tensor,
        video_rows: Tensor,
        audio_rows: Tensor,
        text: Tensor,
        audio_text: Tensor,
        text_mask: Tensor | None,
        first_BSD: Tensor | None = None,
        first_positions: Tensor | None = None,
        first_rows: Tensor | None = None,
        skipped: Collection[int] = (),
        is_isolated: bool = False,
        use: CacheUse | None = None,
    ) -> dict[str, Tensor]:
        """Run all blocks, the last norms and projections on embedded tokens; returns output tokens by segment."""
        segments = None
        if first_BSD is not None and first_positions is not None:
            segments = TokenSegments((first_BSD.shape[1], x_BSD.shape[1]))
            x_BSD = torch.cat((first_BSD, x_BSD), dim=1)
            positions = torch.cat((first_positions, positions))
        positions_of_audio = audio_positions(self.config, audio_BLD.shape[1], audio_BLD.device)
        video_steps = StepRows.split(SegmentRows(first_rows, video_rows, segments), self.time_embed.rows)
        audio_steps = StepRows.split(SegmentRows(None, audio_rows), self.audio_time_embed.rows)
        video = ModalityInputs(video_steps, text, text_mask, *self._video_rotations(positions))
        audio = ModalityInputs(audio_steps, audio_text, text_mask, *self._audio_rotations(positions_of_audio))
        blocks = [
            partial(block, video=video, audio=audio, is_skipped=index in skipped, is_isolated=is_isolated)
            for index, block in enumerate(self._blocks())
        ]
        modalities = run_both_modalities(Modalities(Residual(x_BSD), Residual(audio_BLD)), blocks, use)
        shift, scale = video_steps.output.plus(self.scale_shift_table)
        patches: Tensor = self.proj_out(self.norm_out.after(modalities.video, scale, shift)[1])
        shift, scale = audio_steps.output.plus(self.audio_scale_shift_table)
        sound: Tensor = self.audio_proj_out(self.audio_norm_out.after(modalities.audio, scale, shift)[1])
        if segments is None:
            return {AUDIO: sound, VIDEO: patches}
        first, rest = segments.slices()
        return {AUDIO: sound, FIRST_FRAME: patches[:, first], VIDEO: patches[:, rest]}

    def _video_rotations(self, positions_S3: Tensor) -> tuple[HeadRotation, HeadRotation]:
        """RoPE for self-attention, and for cross-attention with the audio, which has the audio's heads."""
        config = self.config
        extents = (config.max_seconds, config.base_height, config.base_width)
        return self._rotation(positions_S3, extents, config.video), self._exchange_rotation(positions_S3[:, :1])

    def _audio_rotations(self, positions_L1: Tensor) -> tuple[HeadRotation, HeadRotation]:
        config = self.config
        own = self._rotation(positions_L1, (config.audio_max_seconds,), config.audio)
        return own, self._exchange_rotation(positions_L1)

    def _exchange_rotation(self, seconds: Tensor) -> HeadRotation:
        longest = max(self.config.max_seconds, self.config.audio_max_seconds)
        return self._rotation(seconds, (longest,), self.config.audio)

    def _rotation(self, positions: Tensor, extents: Sequence[float], modality: LTX2ModalityConfig) -> HeadRotation:
        config = self.config
        return head_rotation(
            positions,
            extents,
            modality.num_heads,
            modality.head_size,
            theta=config.rope_theta,
            is_neox_style=config.rope_type == "split",
            is_double=config.is_rope_double,
        )

    def _blocks(self) -> Iterator[LTX2VideoTransformerBlock]:
        for block in self.transformer_blocks:
            assert isinstance(block, LTX2VideoTransformerBlock)
            yield block
