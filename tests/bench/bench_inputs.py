"""Inputs of one step for Diffusers' forward() and for ours, at published size or tiny."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

LTX2_FRAME_RATE = 24.0


def flux_inputs(tiny: bool, side: int = 64) -> tuple[Inputs, Inputs]:
    """Packed latents of `side` x `side` tokens, text tokens, and a pooled text embedding."""
    rows, text, width, pooled, channels = (4, 6, 32, 24, 64) if tiny else (side, 512, 4096, 768, 64)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, channels),
        "encoder_hidden_states": _normal(1, text, width),
        "pooled_projections": _normal(1, pooled),
        "timestep": torch.tensor([0.75]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(rows))),
    }
    return dict(shared), shared


def qwen_inputs(tiny: bool, side: int = 64) -> tuple[Inputs, Inputs]:
    """Packed latents of `side` x `side` tokens, and text tokens; positions are centered."""
    rows, text, width, channels = (4, 6, 24, 64) if tiny else (side, 200, 3584, 64)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, channels),
        "encoder_hidden_states": _normal(1, text, width),
        "timestep": torch.tensor([0.75]),
    }
    down = torch.arange(float(rows)) - rows // 2
    positions: Inputs = {
        "img_ids": torch.cartesian_prod(torch.zeros(1), down, down),
        "txt_ids": (torch.arange(float(text)) + rows // 2)[:, None].expand(-1, 3),
    }
    return {**shared, "img_shapes": [[(1, rows, rows)]]}, {**shared, **positions}


def wan_inputs(tiny: bool, grid: tuple[int, int, int] = (21, 60, 104)) -> tuple[Inputs, Inputs]:
    """Latents of `grid` (frames, rows, columns), and padded text; by default 21 latent frames at 480x832."""
    shared = _wan_shared(tiny, 16, (2, 4, 4) if tiny else grid)
    return dict(shared), shared


def causal_wan_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """The first block (3 latent frames) of a 480x832 video with 21 latent frames."""
    rows, columns = (4, 4) if tiny else (60, 104)
    shared = _wan_shared(tiny, 16, (3, rows, columns))
    return dict(shared), {**shared, "video_grid": torch.zeros(1, 0, 21, rows, columns)}


def wan_ti2v_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Latents of 31 latent frames at 704x1280; the first latent frame is an input image at timestep 0.

    The reference has a timestep per token, ours a timestep for the first frame and a timestep for the other frames.
    """
    frames, rows, columns = grid = (2, 4, 4) if tiny else (31, 44, 80)
    shared = _wan_shared(tiny, 48, grid)
    timestep = shared["timestep"]
    tokens = timestep.expand(1, frames * rows * columns // 4).clone()
    tokens[:, : rows * columns // 4] = 0
    return {**shared, "timestep": tokens}, {**shared, "timestep": torch.stack((0 * timestep, timestep), dim=1)}


def _wan_shared(tiny: bool, channels: int, grid: tuple[int, int, int]) -> Inputs:
    return {
        "hidden_states": _normal(1, channels, *grid),
        "timestep": torch.tensor([750]),
        "encoder_hidden_states": _normal(1, 512, 16 if tiny else 4096),
    }


def z_image_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Latents for 2x2 patches, and text tokens padded to a multiple of 32."""
    rows, text, width = (4, 32, 24) if tiny else (64, 224, 2560)
    shared: Inputs = {
        "hidden_states": _normal(1, 16, 2 * rows, 2 * rows),
        "timestep": torch.tensor([0.25]),
        "encoder_hidden_states": _normal(1, text, width),
    }
    side = torch.arange(rows)
    image_ids = torch.cartesian_prod(torch.tensor([text + 1]), side, side)
    padded = torch.nn.functional.pad(image_ids, (0, 0, 0, -rows * rows % 32))
    text_ids = torch.nn.functional.pad(1 + torch.arange(text)[:, None], (0, 2))
    return dict(shared), {**shared, "text_ids": text_ids, "image_ids": padded}


def hunyuan_video_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Latents and text; the reference's text is padded to 256 tokens."""
    sizes, text, width, pooled = ((2, 2, 2), 6, 24, 12) if tiny else ((16, 30, 52), 200, 4096, 768)
    frames, rows, columns = sizes
    shared: Inputs = {
        "hidden_states": _normal(1, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": _normal(1, text, width),
        "pooled_projections": _normal(1, pooled),
    }
    theirs: Inputs = {
        **shared,
        "encoder_hidden_states": torch.nn.functional.pad(shared["encoder_hidden_states"], (0, 0, 0, 256 - text)),
        "encoder_attention_mask": (torch.arange(256) < text)[None].bfloat16(),
        "guidance": torch.tensor([6000.0]),
    }
    video_ids = torch.cartesian_prod(*map(torch.arange, sizes))
    return theirs, {**shared, "guidance": torch.tensor([6.0]), "video_ids": video_ids}


def ltx_video_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Packed latents and text; the reference's text is padded to 128 tokens."""
    sizes, text, width = ((2, 2, 2), 6, 24) if tiny else ((21, 16, 24), 60, 4096)
    frames, rows, columns = sizes
    scale = (8 / 25, 32, 32)
    axes = (torch.arange(float(size)) * unit for size, unit in zip(sizes, scale, strict=True))
    shared: Inputs = {
        "hidden_states": _normal(1, frames * rows * columns, 128),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": _normal(1, text, width),
    }
    theirs: Inputs = {
        **shared,
        "encoder_hidden_states": torch.nn.functional.pad(shared["encoder_hidden_states"], (0, 0, 0, 128 - text)),
        "encoder_attention_mask": (torch.arange(128) < text)[None].bfloat16(),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": scale,
    }
    return theirs, {**shared, "positions": torch.cartesian_prod(*axes)}


def klein_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Packed latents and text tokens of FLUX.2 klein, without guidance."""
    return flux2_inputs(tiny, 7680, None)


def flux2_inputs(tiny: bool, width: int = 15360, guidance: float | None = 4.0) -> tuple[Inputs, Inputs]:
    """Packed latents, and text tokens of the given width."""
    rows, text = (4, 6) if tiny else (64, 512)
    side = torch.arange(float(rows))
    zero = torch.zeros(1)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, 128),
        "encoder_hidden_states": _normal(1, text, 24 if tiny else width),
        "timestep": torch.tensor([0.75]),
        "guidance": None if guidance is None else torch.tensor([guidance]),
        "img_ids": torch.cartesian_prod(zero, side, side, zero),
        "txt_ids": torch.nn.functional.pad(torch.arange(float(text))[:, None], (3, 0)),
    }
    return dict(shared), shared


def qwen_edit_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """An image, two input images of the same size, and their text."""
    return _conditioned_inputs(tiny, 4 if tiny else 64, made=(0,), given=(1, 2), first_text=0)


def qwen_layered_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """An image, its four layers and an input image. Text positions follow the layers' positions."""
    theirs, ours = _conditioned_inputs(tiny, 4 if tiny else 40, made=(0, 1, 2, 3, 4), given=(-1,), first_text=5)
    return {**theirs, "additional_t_cond": torch.zeros(1, dtype=torch.int64)}, ours


def _conditioned_inputs(
    tiny: bool, rows: int, *, made: tuple[int, ...], given: tuple[int, ...], first_text: int
) -> tuple[Inputs, Inputs]:
    """Packed latents of square images. `made` are frame positions of generated images, `given` of input images."""
    text, width = (6, 24) if tiny else (200, 3584)
    down = torch.arange(float(rows)) - rows // 2
    generator = torch.Generator().manual_seed(1)
    shared: Inputs = {
        "hidden_states": torch.randn(1, len(made) * rows * rows, 64, generator=generator).bfloat16(),
        "condition_states": torch.randn(1, len(given) * rows * rows, 64, generator=generator).bfloat16(),
        "encoder_hidden_states": _normal(1, text, width),
        "timestep": torch.tensor([0.75]),
    }
    positions: Inputs = {
        "img_ids": torch.cartesian_prod(torch.tensor(made).float(), down, down),
        "condition_ids": torch.cartesian_prod(torch.tensor(given).float(), down, down),
        "txt_ids": (torch.arange(float(text)) + max(rows // 2, first_text))[:, None].expand(-1, 3),
    }
    return {**shared, "img_shapes": [[(1, rows, rows)] * len((*made, *given))]}, {**shared, **positions}


def glm_image_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Latents, 64 glyph bytes, and a prior token for every image token; no prior token is dropped."""
    rows, text, width = (8, 6, 32) if tiny else (128, 64, 1472)
    tokens = rows * rows // 4
    shared: Inputs = {
        "hidden_states": _normal(1, 16, rows, rows),
        "timestep": torch.tensor([749.0]),
        "encoder_hidden_states": _normal(1, text, width),
        "prior_token_id": torch.arange(tokens)[None],
        "prior_token_drop": torch.zeros(1, tokens, dtype=torch.bool),
        "target_size": torch.full((1, 2), 8.0 * rows),
        "crop_coords": torch.zeros(1, 2),
    }
    return dict(shared), shared


def ltx2_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """Latents of 121 frames at 512x768 with audio, and padded text."""
    if tiny:
        return ltx2_step(grid=(2, 2, 3), sound=9, text=32, widths=(24, 24))
    return ltx2_step(grid=(16, 16, 24), sound=126, text=1024, widths=(3840, 3840))


def ltx2_step(
    *, grid: tuple[int, ...], sound: int, text: int, widths: tuple[int, int], channels: tuple[int, int] = (128, 128)
) -> tuple[Inputs, Inputs]:
    """Inputs of one LTX-2 step.

    `grid` is (frames, rows, columns) of the video latents. `sound` is the number of audio latents, which have one mel
    bin. `text` is the number of text tokens; `widths` are text widths and `channels` latent channels, each for (video,
    audio). The reference takes and returns tokens, ours latents: see ltx2_tokens().
    """
    latents: Inputs = {
        "hidden_states": _normal(1, channels[0], *grid),
        "audio_hidden_states": _normal(1, channels[1], sound, 1),
    }
    shared: Inputs = {
        "encoder_hidden_states": _normal(1, text, widths[0]),
        "audio_encoder_hidden_states": _normal(1, text, widths[1]),
        "timestep": torch.tensor([750.0]),
    }
    mask = torch.ones(1, text, dtype=torch.int64)
    theirs: Inputs = {
        **shared,
        **dict(zip(latents, ltx2_tokens(latents), strict=True)),
        "sigma": shared["timestep"],
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "audio_num_frames": sound,
        "fps": LTX2_FRAME_RATE,
        "use_cross_timestep": True,
    }
    return theirs, {**shared, **latents, "fps": torch.tensor([LTX2_FRAME_RATE])}


def ltx2_tokens(latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Convert latents to Diffusers' tokens: video (B, S, C) and audio (B, L, C x bins)."""
    video, audio = latents["hidden_states"], latents["audio_hidden_states"]
    return video.flatten(2).transpose(1, 2), audio.transpose(1, 2).flatten(2)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()
