"""Parity of the Wan 2.2 TI2V-5B VAE with Diffusers: residual up blocks, pixel patches, bounded memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from common.errors import CheckpointError
from configs.models.vaes.wan import AutoencoderKLWanConfig
from local_fleet import relative_error
from models.vaes.wan import RESIDUAL_DECODING_BYTES, WanVAE
from tensor_memory import PeakBytes
from tiny_flux import randomize
from tiny_wan import build_tiny_wan_ti2v, residual_vae
from wan_frames import check_frames_come_early, check_sessions, decode

MAX_ERROR = 1e-5
STRIPS_BYTES = 6_000_000
"""A bound of decoding memory that requires strips."""
SIDE = 16
"""Pixels per latent, vertically and horizontally."""

PUBLISHED: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


@pytest.fixture(scope="module")
def reference() -> AutoencoderKLWan:
    """Diffusers' VAE, used only as the reference."""
    torch.manual_seed(0)
    model = residual_vae().eval().requires_grad_(False)
    randomize(model)
    assert all(bool(parameter.all()) for parameter in model.parameters())
    return model


@pytest.fixture(scope="module")
def vae(reference: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy of the reference, for WanVAE."""
    return copy.deepcopy(reference)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_frames(reference: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode with Diffusers; returns (3, frames, H, W). Asserts that frames are neither constant nor mostly clamped."""
    with torch.inference_mode():
        video: Tensor = reference.decode(latents, return_dict=False)[0][0]
    assert 0.1 < float(video.std()) < 0.9
    assert 0 < float((video.abs() == 1).double().mean()) < 0.5, "some pixels must be clamped and others not"
    return video


@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 6, 4), (3, 2, 5), (5, 3, 3)])
def test_decoded_frames_match_diffusers(
    reference: AutoencoderKLWan, vae: AutoencoderKLWan, shape: tuple[int, int, int]
) -> None:
    latents = noise(1, 48, *shape)
    theirs, ours = reference_frames(reference, latents), decode(vae, latents)
    frames, height, width = shape
    assert ours.shape == theirs.shape == (3, 4 * frames - 3, SIDE * height, SIDE * width)
    assert relative_error(ours, theirs) <= MAX_ERROR
    assert float((ours - theirs).abs().max()) <= MAX_ERROR


@pytest.mark.parametrize("shape", [(1, 64, 96), (5, 96, 64), (9, 32, 80)])
def test_encoded_videos_match_diffusers(
    reference: AutoencoderKLWan, vae: AutoencoderKLWan, shape: tuple[int, int, int]
) -> None:
    video = noise(1, 3, *shape, seed=4).clamp(-1, 1)
    frames, height, width = shape
    with torch.inference_mode():
        theirs = reference.encode(video, return_dict=False)[0].mode()
        ours = WanVAE(vae).encode(video)
    assert ours.shape == theirs.shape == (1, 48, (frames + 3) // 4, height // SIDE, width // SIDE)
    assert relative_error(ours, theirs) <= MAX_ERROR
    assert float(theirs.std()) > 0.1, "constant latents would prove nothing"


@pytest.mark.parametrize("shape", [(3, 2, 60), (2, 60, 2)])
def test_frames_decoded_in_strips_match_diffusers(
    reference: AutoencoderKLWan, vae: AutoencoderKLWan, shape: tuple[int, int, int]
) -> None:
    latents = noise(1, 48, *shape, seed=2)
    assert len(WanVAE(vae, STRIPS_BYTES)._strips(*shape, 1)) > 2
    assert len(WanVAE(vae)._strips(*shape, 1)) == 1
    theirs, ours = reference_frames(reference, latents), decode(vae, latents, STRIPS_BYTES)
    assert float((ours - theirs).abs().max()) <= MAX_ERROR


def test_a_frame_is_returned_before_the_next_latents_are_read(vae: AutoencoderKLWan) -> None:
    check_frames_come_early(vae, noise(1, 48, 3, 3, 3, seed=3))


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [3, 1], [1, 3]])
def test_latents_may_arrive_in_pieces(vae: AutoencoderKLWan, pieces: list[int]) -> None:
    check_sessions(vae, noise(1, 48, 4, 2, 3, seed=5), pieces)


def test_pieces_of_a_large_video_are_decoded_at_the_end(vae: AutoencoderKLWan) -> None:
    check_sessions(vae, noise(1, 48, 3, 2, 60, seed=6), [1, 2], STRIPS_BYTES)


def published_peak(shape: tuple[int, int, int], dtype: torch.dtype, decoding_bytes: int | None = None) -> int:
    """Peak bytes of decoding at the published width, counted on the meta device.

    Weights and latents are not counted.
    """
    with torch.device("meta"):
        published = WanVAE(AutoencoderKLWan(**PUBLISHED).to(dtype), decoding_bytes)
        latents = torch.empty(1, 48, *shape, dtype=dtype)
    with torch.inference_mode(), PeakBytes() as memory:
        frames = [frame.shape for frame in published.decode(latents)]
    assert frames == [(3, SIDE * shape[1], SIDE * shape[2])] * (4 * shape[0] - 3)
    return int(memory.peak - latents.nbytes)


def test_704x1280_decodes_in_five_gigabytes_at_any_length() -> None:
    short, long = (published_peak((frames, 44, 80), torch.bfloat16) for frames in (3, 6))
    assert short == long <= 5_000_000_000


def test_704x1280_decodes_within_the_bound_in_float32() -> None:
    assert published_peak((3, 44, 80), torch.float32) <= RESIDUAL_DECODING_BYTES


def test_704x1280_decodes_in_strips_within_four_gigabytes() -> None:
    assert published_peak((6, 44, 80), torch.bfloat16, 4_000_000_000) <= 4_000_000_000


def test_the_published_config_has_the_published_factors() -> None:
    config = AutoencoderKLWanConfig.from_dict("vae", PUBLISHED)
    assert (config.z_dim, config.spatial_factor, config.temporal_factor) == (48, 16, 4)
    assert [config.latent_frames(frames) for frames in (1, 5, 121)] == [1, 2, 31]


def test_an_empty_config_equals_wan_2_1() -> None:
    config = AutoencoderKLWanConfig.from_dict("vae", {})
    assert (config.z_dim, config.spatial_factor, config.temporal_factor) == (16, 8, 4)


@pytest.mark.parametrize(
    ("entry", "value", "rule"),
    [
        ("scale_factor_spatial", 8, "is not 16"),
        ("scale_factor_spatial", None, "is not 16"),
        ("scale_factor_temporal", 8, "is not 4"),
        ("patch_size", 4, "is not 48"),
        ("patch_size", 0, "at least 1"),
        ("in_channels", 3, "is not 12"),
        ("out_channels", None, "is not 12"),
        ("dim_mult", [1, 2, 4], "a list of 2 entries"),
        ("temperal_downsample", [True], "a list of 3 entries"),
        ("temperal_downsample", [0, 1, 1], "true and false"),
        ("is_residual", "yes", "true or false"),
        ("latents_mean", None, "a list of 48 numbers"),
        ("latents_std", [0.0] * 48, "a list without 0"),
    ],
)
def test_entries_that_contradict_each_other_are_refused(entry: str, value: object, rule: str) -> None:
    reported = {"patch_size": "in_channels", "dim_mult": "temperal_downsample"} if rule != "at least 1" else {}
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKLWanConfig.from_dict("vae", PUBLISHED | {entry: value})
    assert str(caught.value).startswith(f"vae/config.json: {reported.get(entry, entry)}: ")
    assert rule in str(caught.value)


@pytest.mark.parametrize("kind", [WanPipeline, WanImageToVideoPipeline])
def test_both_pipelines_of_diffusers_load_the_tiny_checkpoint(tmp_path: Path, kind: Any) -> None:
    pipeline = kind.from_pretrained(build_tiny_wan_ti2v(tmp_path / "ti2v"))
    assert isinstance(pipeline, kind)
    assert pipeline.config.expand_timesteps
    assert pipeline.scheduler.config.flow_shift == 5
    modules = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    assert all(bool(parameter.all()) for module in modules for parameter in module.parameters())
