"""Parity of all LTX-2 stages with both of Diffusers' pipelines on the same directory.

The weights are random, but the scale factors are the published ones. A request with an image is compared with
LTX2ImageToVideoPipeline, a request without an image with LTX2Pipeline.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from coarse_images import coarse_image
from common.errors import InvalidInput
from local_fleet import RecordedCall, relative_error
from ltx2_pair import Request, Sides, check, given
from models.validation import InputValidationStage
from mp4_sound import decoded_sound
from tiny_ltx2 import LAYERS, build_tiny_ltx2
from wan_pair import LATENTS_WITHIN

LONG = "old  stone & river\n" * 40
OFF: Request = {
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}

TEXT: dict[str, Request] = {
    "all guidance": {"negative_prompt": "old stone"},
    "without guidance": {**OFF, "negative_prompt": "is not read"},
    "guidance by a negative prompt alone": {**OFF, "guidance_scale": 4.0, "audio_guidance_scale": 2.0},
    "guidance of the audio alone": {**OFF, "audio_guidance_scale": 5.0},
    "an audio scale of 0": {**OFF, "guidance_scale": 3.0, "audio_guidance_scale": 0.0},
    "spatio-temporal guidance alone": {**OFF, "stg_scale": 1.5, "spatio_temporal_guidance_blocks": (0.0, 2.0)},
    "modality guidance alone": {**OFF, "modality_scale": 2.0, "audio_modality_scale": 4.0},
    "two branches and rescaling": {**OFF, "stg_scale": 1.0, "guidance_rescale": 0.9, "audio_guidance_rescale": 0.3},
    "rescaling without guidance": {**OFF, "guidance_rescale": 0.7, "audio_guidance_rescale": 0.7},
    "blocks that the model lacks": {**OFF, "stg_scale": 1.0, "spatio_temporal_guidance_blocks": (float(LAYERS), 28.0)},
    "tall": {"height": 160, "width": 64},
    "12 frames, rounded to 9": {"num_frames": 12},
    "one frame": {"num_frames": 1},
    "many frames at an odd rate": {"num_frames": 33, "frame_rate": 29.97, "num_inference_steps": 2},
    "slow motion": {"motion_speed": 0.2},
    "empty prompt": {"prompt": ""},
    "very long prompt": {"prompt": LONG, "negative_prompt": LONG[4:], "num_inference_steps": 2},
    "few tokens": {"prompt": LONG, "max_sequence_length": 16, "num_inference_steps": 2},
    "many steps": {"num_inference_steps": 9},
    "sigmas": {"sigmas": (1.0, 0.7, 0.4, 0.2), "num_inference_steps": 4},
    "two outputs": {"num_outputs_per_prompt": 2},
}

IMAGE: dict[str, tuple[Request, tuple[int, int]]] = {
    "all guidance": ({"negative_prompt": "old stone"}, (150, 90)),
    "without guidance": (OFF, (150, 90)),
    "modality guidance and rescaling": ({**OFF, "modality_scale": 3.0, "guidance_rescale": 0.8}, (150, 90)),
    "tall, another aspect ratio": ({"height": 160, "width": 64}, (40, 300)),
    "the video's size, without compression": ({"image_crf": 0}, (96, 64)),
    "odd sizes, little compression": ({"image_crf": 5}, (97, 63)),
    "one frame": ({"num_frames": 1, "num_inference_steps": 2}, (150, 90)),
    "12 frames, rounded to 9": ({"num_frames": 12}, (64, 64)),
    "without cross timestep": ({"use_cross_timestep": False}, (150, 90)),
    "many steps": ({"num_inference_steps": 9}, (150, 90)),
    "two outputs": ({"num_outputs_per_prompt": 2}, (150, 90)),
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    torch.set_num_threads(1)
    opened = Sides.open(build_tiny_ltx2(tmp_path_factory.mktemp("ltx2") / "new"))
    yield opened
    opened.fleet.close()


@pytest.fixture(scope="module")
def default_results(sides: Sides) -> dict[str, Tensor]:
    """This project's results of the default request."""
    return sides.ours({})


@pytest.fixture(scope="module")
def old_sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    torch.set_num_threads(1)
    opened = Sides.open(build_tiny_ltx2(tmp_path_factory.mktemp("ltx2") / "old", version="2.0"))
    yield opened
    opened.fleet.close()


@pytest.mark.parametrize("case", TEXT)
def test_text_to_video_matches_diffusers(sides: Sides, case: str) -> None:
    check(sides.ours(TEXT[case]), sides.theirs(TEXT[case]))


@pytest.mark.parametrize("case", IMAGE)
def test_image_to_video_matches_diffusers(sides: Sides, case: str) -> None:
    request, size = IMAGE[case]
    image = coarse_image(*size, seed=1)
    check(sides.ours(request, image), sides.theirs(request, image))


def test_separate_decoding_of_reference_latents_equals_the_reference_pipeline(sides: Sides) -> None:
    for image in (None, coarse_image(150, 90, seed=1)):
        decoded = sides.theirs({}, image)
        pixels, audio = sides.call({}, image, "pt")
        assert torch.equal(decoded["audio"], audio)
        assert relative_error(decoded["pixels"], pixels) <= 1e-6


@pytest.mark.parametrize("case", ["all guidance", "without guidance", "12 frames, rounded to 9", "two outputs"])
def test_ltx_2_0_matches_diffusers(old_sides: Sides, case: str) -> None:
    """The small LTX-2.0 checkpoint has interleaved RoPE, one text projection and another vocoder.

    It has no gates and no text modulation.
    """
    check(old_sides.ours(TEXT[case]), old_sides.theirs(TEXT[case]))
    request, size = IMAGE[case]
    image = coarse_image(*size, seed=1)
    check(old_sides.ours(request, image), old_sides.theirs(request, image))


def test_padding_without_registers_is_masked(tmp_path: Path) -> None:
    sides = Sides.open(build_tiny_ltx2(tmp_path / "m", version="2.0", registers=None))
    check(sides.ours({}), sides.theirs({}))
    sides.fleet.close()


def test_both_pipeline_class_names_give_one_model(sides: Sides, tmp_path: Path) -> None:
    """A directory saved by LTX2ImageToVideoPipeline has both variants."""
    sides.image.save_pretrained(str(tmp_path / "m"))
    other = Sides.open(tmp_path / "m")
    assert other.fleet.model.checkpoint.pipeline_name == "LTX2ImageToVideoPipeline"
    for image in (None, coarse_image(96, 64, seed=1)):
        ours, expected = other.ours({}, image), sides.ours({}, image)
        assert all(torch.equal(each, expected[name]) for name, each in ours.items())
    other.fleet.close()


def test_outputs_differ_from_each_other_and_from_a_single_output(sides: Sides) -> None:
    """Video noise of all outputs is drawn before audio noise. The first output has the video noise of a single output,
    but other audio noise, which affects its video.
    """
    one, both = (sides.ours({**OFF, "num_outputs_per_prompt": count}) for count in (1, 2))
    assert relative_error(both["latents"][:1], one["latents"]) > 10 * LATENTS_WITHIN, "the audio noise differs"
    assert relative_error(both["latents"][1:], both["latents"][:1]) > 10 * LATENTS_WITHIN
    assert relative_error(both["audio_latents"][1:], both["audio_latents"][:1]) > 10 * LATENTS_WITHIN


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue car"},
        {"negative_prompt": "a blue car"},
        {"guidance_scale": 2.0},
        {"audio_guidance_scale": 2.0},
        {"stg_scale": 2.0},
        {"audio_stg_scale": 2.0},
        {"modality_scale": 2.0},
        {"audio_modality_scale": 2.0},
        {"guidance_rescale": 0.2},
        {"audio_guidance_rescale": 0.2},
        {"spatio_temporal_guidance_blocks": (2.0,)},
        {"motion_speed": 0.5},
        {"max_sequence_length": 48},
        {"seed": 8},
    ],
    ids=str,
)
def test_every_input_changes_the_result(sides: Sides, default_results: dict[str, Tensor], change: Request) -> None:
    """Negative control: each change moves video and audio by more than 10 times the parity tolerance."""
    changed = sides.ours(change)
    for name in ("latents", "audio_latents"):
        assert relative_error(changed[name], default_results[name]) > 10 * LATENTS_WITHIN


def test_image_arguments_change_later_frames_and_the_audio(sides: Sides) -> None:
    """The image, image_crf and use_cross_timestep affect the frames after the first frame, and the audio."""
    image, other = (coarse_image(150, 90, seed) for seed in (1, 2))
    before = sides.ours({}, image)
    for request, given_image in (({}, other), ({"image_crf": 0}, image), ({"use_cross_timestep": False}, image)):
        changed = sides.ours(request, given_image)
        assert relative_error(changed["latents"][:, :, 1:], before["latents"][:, :, 1:]) > 1e-4
        assert relative_error(changed["audio_latents"], before["audio_latents"]) > 1e-4


def test_rounded_frames_and_unused_guidance_are_reported(sides: Sides, old_sides: Sides) -> None:
    cases = {
        "num_frames": (sides, {"num_frames": 12}),
        "audio_stg_scale": (sides, {**OFF, "audio_stg_scale": 0.0, "stg_scale": 1.0}),
        "stg_scale": (old_sides, {"stg_scale": 0.5, "audio_stg_scale": 0.5}),
        "spatio_temporal_guidance_blocks": (sides, {"spatio_temporal_guidance_blocks": (28.0,)}),
    }
    for field, (side, request) in cases.items():
        validated = InputValidationStage(side.fleet.model).run(given(**request))
        assert field in {warning.field for warning in validated.warnings}, field
    assert not InputValidationStage(sides.fleet.model).run(given()).warnings


def test_a_truncated_prompt_is_reported(sides: Sides) -> None:
    recorded = RecordedCall()
    sides.fleet.media(recorded, **given(LONG, num_inference_steps=2, output_format="safetensors"))
    ((field, message),) = [warning for warning in recorded.warnings if warning[0] == "prompt"]
    assert field == "prompt"
    assert "tokens are truncated to 32, the limit of text_encoder" in message
    assert "stone" in message


def test_an_mp4_has_the_frames_and_the_audio(sides: Sides) -> None:
    """Each output has its own audio. It lasts as long as the 12 requested frames, the video as long as 9 frames."""
    tensors = sides.ours({"num_frames": 12, "num_outputs_per_prompt": 2})
    items = sides.fleet.media(images={}, **given(num_frames=12, num_outputs_per_prompt=2)).items
    assert [(item.content_type, item.num_frames) for item in items] == [("video/mp4", 9)] * 2
    for index, item in enumerate(items):
        with av.open(io.BytesIO(item.data.numpy().tobytes()), mode="r") as container:
            frames = [torch.from_numpy(each.to_ndarray(format="rgb24")) for each in container.decode(video=0)]
            assert container.streams.audio[0].rate == 48000
        video = torch.stack(frames).permute(0, 3, 1, 2) / 255
        # 4:2:0 subsampling and compression change random pixels, but preserve their averages.
        differences = [float(avg_pool2d(video - each, 16).abs().mean()) for each in tensors["pixels"]]
        assert 2 * differences[index] < differences[1 - index]
        recorded = decoded_sound(item.data.numpy().tobytes())
        expected = tensors["audio"][index]
        # An AAC packet has 1024 samples.
        assert expected.shape[1] <= recorded.shape[1] < expected.shape[1] + 1024
        errors = [relative_error(recorded[:, : expected.shape[1]], each) for each in tensors["audio"]]
        assert errors[index] < 0.5
        assert 1.5 * errors[index] < errors[1 - index]


def test_an_image_that_cannot_be_compressed_is_refused(sides: Sides) -> None:
    """H.264 subsamples colors and cannot encode one row of pixels. Without compression, the image is accepted."""
    image = coarse_image(40, 1, seed=1)
    with pytest.raises(InvalidInput, match="image: 40 x 1 pixels are not enough to compress") as refused:
        sides.ours({}, image)
    assert refused.value.field == "image"
    assert sides.ours({"image_crf": 0, "num_inference_steps": 2}, image)["pixels"].isfinite().all()
