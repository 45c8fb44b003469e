"""Frame-by-frame decoding with the Wan VAE: parity with Diffusers' decoder, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from models.vaes.wan import DECODING_BYTES, DecodingSession, WanVAE
from tensor_memory import PeakBytes
from tiny_flux import randomize
from wan_frames import check_frames_come_early, check_sessions, decode

MAX_ERROR = 1e-5
STRIPS_BYTES = 4_000_000
"""A bound of decoding memory that requires strips."""


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8, num_res_blocks=1).eval().requires_grad_(False)
    randomize(model)
    return model


@pytest.mark.parametrize("shape", [(1, 6, 8), (2, 8, 6), (5, 4, 4)])
def test_frames_equal_decoding_at_once(vae: AutoencoderKLWan, shape: tuple[int, int, int]) -> None:
    latents = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        at_once = vae.decode(latents, return_dict=False)[0]
    frames = decode(vae, latents)
    assert frames.shape == at_once[0].shape
    assert float((frames - at_once[0]).abs().max()) <= MAX_ERROR
    assert float(at_once.std()) > 0.1, "a flat image would prove nothing"


@pytest.mark.parametrize("shape", [(3, 4, 60), (2, 60, 4)])
def test_frames_decoded_in_strips_equal_decoding_at_once(vae: AutoencoderKLWan, shape: tuple[int, int, int]) -> None:
    latents = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(2))
    assert len(WanVAE(vae, STRIPS_BYTES)._strips(*shape, 1)) > 2
    with torch.inference_mode():
        at_once = vae.decode(latents, return_dict=False)[0]
    assert float((decode(vae, latents, STRIPS_BYTES) - at_once[0]).abs().max()) <= MAX_ERROR


def test_a_frame_is_returned_before_the_next_latents_are_read(vae: AutoencoderKLWan) -> None:
    check_frames_come_early(vae, torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1], [3, 2], [2, 3], [5]])
def test_latents_may_arrive_in_pieces(vae: AutoencoderKLWan, pieces: list[int]) -> None:
    check_sessions(vae, torch.randn(1, 16, 5, 4, 6, generator=torch.Generator().manual_seed(4)), pieces)


def test_pieces_of_a_large_video_are_decoded_at_the_end(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, 16, 3, 4, 60, generator=torch.Generator().manual_seed(5))
    check_sessions(vae, latents, [2, 1], STRIPS_BYTES)
    session = WanVAE(vae, STRIPS_BYTES).session(3, 4, 60)
    with torch.inference_mode():
        assert [len(list(session.feed(part))) for part in torch.split(latents, [2, 1], dim=2)] == [0, 9]


def published_session(frames: int, concurrent: int) -> DecodingSession:
    """A session at the published size on the meta device, for 480x832 in bfloat16."""
    with torch.device("meta"):
        return WanVAE(AutoencoderKLWan().to(torch.bfloat16)).session(frames, 60, 104, concurrent=concurrent)


@pytest.mark.parametrize("concurrent", [1, 2])
def test_interleaved_sessions_decode_within_the_bound(concurrent: int) -> None:
    """One 480x832 video is decoded incrementally. Two are decoded at the end, as their caches exceed the bound."""
    sessions = [published_session(6, concurrent) for _ in range(concurrent)]
    latents = torch.empty(1, 16, 3, 60, 104, dtype=torch.bfloat16, device="meta")
    with torch.inference_mode(), PeakBytes() as memory:
        counts = [[sum(1 for _ in session.feed(latents)) for session in sessions] for _ in range(2)]
    assert counts == {1: [[9], [12]], 2: [[0, 0], [21, 21]]}[concurrent]
    assert memory.peak <= DECODING_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_wide_video_decodes_within_four_gigabytes(dtype: torch.dtype) -> None:
    """81 frames of 480x832 with the published VAE; peak bytes are counted on the meta device."""
    with torch.device("meta"):
        published = WanVAE(AutoencoderKLWan().to(dtype))
        latents = torch.empty(1, 16, 21, 60, 104, dtype=dtype)
    with torch.inference_mode(), PeakBytes() as memory:
        frames = sum(1 for _ in published.decode(latents))
    assert frames == 81
    assert memory.peak <= DECODING_BYTES


def test_decoding_at_once_exceeds_four_gigabytes() -> None:
    """Negative control of PeakBytes."""
    with torch.device("meta"):
        published = AutoencoderKLWan()
        latents = torch.empty(1, 16, 3, 60, 104)
    with torch.inference_mode(), PeakBytes() as memory:
        published.decode(latents)
    assert memory.peak > 4e9
