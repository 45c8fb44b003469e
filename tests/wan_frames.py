"""Checks of frame-by-frame decoding with the Wan VAEs."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.vaes.wan import WanVAE


def decode(vae: AutoencoderKLWan, latents: Tensor, decoding_bytes: int | None = None) -> Tensor:
    """Decode with WanVAE; returns frames of shape (3, frames, H, W)."""
    with torch.inference_mode():
        return torch.stack(list(WanVAE(vae, decoding_bytes).decode(latents)), dim=1)


def check_frames_come_early(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Assert that no frame depends on later latents, and that the first frame needs one latent frame.

    `latents` have the shape (1, channels, 3, H, W).
    """
    changed = latents.clone()
    changed[:, :, 2] += 1
    before, after = decode(vae, latents), decode(vae, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
    frames = WanVAE(vae).decode(latents)
    seen: list[int] = []
    handle = vae.post_quant_conv.register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        next(frames)
    handle.remove()
    assert len(seen) == 1


def check_sessions(
    vae: AutoencoderKLWan, latents: Tensor, pieces: list[int], decoding_bytes: int | None = None
) -> None:
    """Assert that two interleaved videos, decoded in pieces, are byte-equal to videos decoded at once.

    `latents` have the shape (1, channels, sum of `pieces`, H, W).
    """
    videos = [latents, latents.flip(2)]
    ours = WanVAE(vae, decoding_bytes)
    sessions = [ours.session(*latents.shape[2:], concurrent=2) for _ in videos]
    made: list[list[Tensor]] = [[] for _ in videos]
    with torch.inference_mode():
        for parts in zip(*(torch.split(video, pieces, dim=2) for video in videos), strict=True):
            for frames, session, part in zip(made, sessions, parts, strict=True):
                frames.extend(session.feed(part))
    for video, frames in zip(videos, made, strict=True):
        assert torch.equal(torch.stack(frames, dim=1), decode(vae, video, decoding_bytes))
    with torch.inference_mode(), pytest.raises(ValueError, match="1 frames are 1 more than the video has left"):
        list(sessions[0].feed(latents[:, :, :1]))
