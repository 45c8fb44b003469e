"""Parity of all LTX-Video stages with Diffusers' pipelines: same weights, seed and arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXImageToVideoPipeline, LTXPipeline
from PIL import Image
from torch import Tensor

from coarse_images import coarse_image, png
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.pipeline_configs.ltx_video import LTXVideoPipelineConfig
from local_fleet import NO_IMAGES, LocalFleet, RecordedCall, open_fleet, reference_run, relative_error
from tiny_ltx2 import edit_json
from tiny_ltx_video import build_tiny_ltx_video, build_tiny_ltx_video_095
from wan_pair import check, open_reference

BASE: dict[str, Any] = {"prompt": "a red apple", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
LONG = "the old stone river on the moon and the red cat in a blue car " * 30
IMAGE = coarse_image(90, 60)

MODES: dict[str, tuple[str, dict[str, Any], Image.Image | None]] = {
    "guided": ("0.9.0", {"negative_prompt": "a blue car"}, None),
    "not guided, one frame": ("0.9.0", {"guidance_scale": 1.0, "num_frames": 1}, None),
    "two outputs, wide, rescaled": (
        "0.9.0",
        {"num_outputs_per_prompt": 2, "width": 96, "guidance_rescale": 0.7, "num_inference_steps": 3},
        None,
    ),
    "long prompts, low frame rate": ("0.9.0", {"prompt": LONG, "negative_prompt": LONG[9:], "frame_rate": 12.5}, None),
    "few tokens": ("0.9.0", {"prompt": LONG, "max_sequence_length": 3}, None),
    "image": ("0.9.0", {"negative_prompt": "a blue car"}, IMAGE),
    "image, two outputs, tall, rescaled": (
        "0.9.0",
        {"num_outputs_per_prompt": 2, "height": 96, "guidance_rescale": 0.5, "num_frames": 17},
        IMAGE,
    ),
    "decoder noise": ("0.9.5", {"decode_timestep": 0.05, "decode_noise_scale": 0.025}, None),
    "timestep noise, two outputs": ("0.9.5", {"decode_timestep": 0.1, "num_outputs_per_prompt": 2}, None),
    "no noise": ("0.9.5", {"guidance_scale": 1.0}, None),
    "image, decoder noise": ("0.9.5", {"decode_timestep": 0.05, "num_outputs_per_prompt": 2}, IMAGE),
}
"""(version of the VAE, changes of BASE, input image) by mode."""


@dataclass(frozen=True)
class Sides:
    """One checkpoint: `fleet` runs our services in this process, next to Diffusers' pipelines."""

    fleet: LocalFleet
    text: Any
    image: Any

    @classmethod
    def open(cls, path: Path) -> Sides:
        """Load the checkpoint into the fleet and into both of Diffusers' pipelines."""
        text, image = (open_reference(path, kind) for kind in (LTXPipeline, LTXImageToVideoPipeline))
        return cls(open_fleet(str(path)), text, image)

    def ours(self, given: Mapping[str, Any], image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run our services; returns "latents" and "pixels". An image selects the I2V variant."""
        images = NO_IMAGES if image is None else {"image": png(image)}
        return self.fleet.tensors(images=images, seed=5, **given)

    def theirs(self, given: Mapping[str, Any], image: Image.Image | None = None) -> dict[str, Tensor]:
        """Run Diffusers' pipeline, which needs a decoding timestep per output; returns "latents" and "pixels"."""
        call = dict(given)
        outputs = call["num_videos_per_prompt"] = call.pop("num_outputs_per_prompt", 1)
        if "decode_timestep" in call:
            call["decode_timestep"] = [call["decode_timestep"]] * outputs
        if image is not None:
            return reference_run(self.image, seed=5, image=image, **call)
        return reference_run(self.text, seed=5, **call)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sides]]:
    """Sides by version of the VAE."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ltx")
    built = {"0.9.0": build_tiny_ltx_video(folder / "090"), "0.9.5": build_tiny_ltx_video_095(folder / "095")}
    opened = {version: Sides.open(path) for version, path in built.items()}
    yield opened
    for each in opened.values():
        each.fleet.close()


@pytest.mark.parametrize("mode", MODES)
def test_latents_and_pixels_match_diffusers(sides: dict[str, Sides], mode: str) -> None:
    version, change, image = MODES[mode]
    given = BASE | change
    check(sides[version].ours(given, image), sides[version].theirs(given, image))


@pytest.mark.parametrize("num_frames", [10, 16])
def test_frame_counts_are_rounded_as_in_diffusers_with_a_warning(sides: dict[str, Sides], num_frames: int) -> None:
    """Diffusers rounds down without a warning."""
    pair, given = sides["0.9.0"], BASE | {"num_frames": num_frames}
    check(pair.ours(given), pair.theirs(given))
    _, warnings = pair.fleet.model.variants[0].sampling_params.build(given, pair.fleet.model.checkpoint)
    message = f"{num_frames} is not one more than a multiple of 8; 9 is used instead"
    assert [(warning.field, warning.message) for warning in warnings] == [("num_frames", message)]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue apple"},
        {"negative_prompt": "a red car"},
        {"guidance_scale": 4.0},
        {"guidance_rescale": 0.5},
        {"frame_rate": 12.0},
        {"max_sequence_length": 2},
    ],
    ids=str,
)
def test_every_input_changes_the_result(sides: dict[str, Sides], change: dict[str, Any]) -> None:
    given = BASE | {"negative_prompt": "a blue car"}
    before, after = (sides["0.9.0"].ours(each)["latents"] for each in (given, given | change))
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("change", [{"decode_timestep": 0.2}, {"decode_noise_scale": 0.3}], ids=str)
def test_decoder_noise_does_not_change_latents(sides: dict[str, Sides], change: dict[str, Any]) -> None:
    given = BASE | {"decode_timestep": 0.05, "decode_noise_scale": 0.05}
    before, after = (sides["0.9.5"].ours(each) for each in (given, given | change))
    assert torch.equal(before["latents"], after["latents"])
    assert relative_error(after["pixels"], before["pixels"]) > 1e-3


def test_the_image_changes_the_first_frame_and_the_later_frames(sides: dict[str, Sides]) -> None:
    first, other = (sides["0.9.0"].ours(BASE, image)["latents"] for image in (IMAGE, coarse_image(90, 60, 3)))
    tokens = 2 * 2
    for rows in (slice(0, tokens), slice(tokens, None)):
        assert relative_error(other[:, rows], first[:, rows]) > 1e-3


def test_parameters_without_effect_are_reported(sides: dict[str, Sides]) -> None:
    unused: dict[str, Any] = {"guidance_scale": 1.0, "negative_prompt": "a car", "guidance_rescale": 0.5}
    unused |= {"decode_timestep": 0.1, "decode_noise_scale": 0.1}
    model = sides["0.9.0"].fleet.model
    params, warnings = model.variants[0].sampling_params.build({**BASE, **unused}, model.checkpoint)
    assert {warning.field for warning in warnings} == unused.keys() - {"guidance_scale"}
    assert params.branches == 1
    model = sides["0.9.5"].fleet.model
    assert not model.variants[0].sampling_params.build({**BASE, "decode_timestep": 0.1}, model.checkpoint)[1]


def test_a_truncated_prompt_is_reported(sides: dict[str, Sides]) -> None:
    recorded = RecordedCall()
    given = BASE | {"prompt": "a old stone river", "max_sequence_length": 3, "guidance_scale": 1.0}
    sides["0.9.0"].fleet.tensors(recorded, seed=1, **given)
    assert [(field, "truncated to 3" in message) for field, message in recorded.warnings] == [("prompt", True)]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"height": 48}, "height"),
        ({"width": 16}, "width"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_inference_steps": 1}, "num_inference_steps"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"output_format": "png"}, "output_format"),
    ],
    ids=str,
)
def test_unsupported_requests_are_refused(sides: dict[str, Sides], given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        sides["0.9.0"].fleet.media(**BASE | given, seed=1)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("roles", "frames", "field"),
    [(("image",), 8, "num_frames"), (("image", "last_image"), 9, "last_image"), (("last_image",), 9, "last_image")],
    ids=str,
)
def test_unsupported_images_and_frame_counts_are_refused(
    sides: dict[str, Sides], roles: tuple[str, ...], frames: int, field: str
) -> None:
    """8 frames are rounded to one latent frame, which would show only the image."""
    images = dict.fromkeys(roles, png(IMAGE))
    with pytest.raises(InvalidInput) as caught:
        sides["0.9.0"].fleet.media(None, images, **BASE | {"num_frames": frames}, seed=1)
    assert caught.value.field == field


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
def test_bfloat16_is_close_to_float32(sides: dict[str, Sides], image: Image.Image | None) -> None:
    bfloat16 = open_fleet(str(sides["0.9.5"].fleet.model.checkpoint.path), torch.bfloat16)
    images = NO_IMAGES if image is None else {"image": png(image)}
    ours = bfloat16.tensors(images=images, seed=5, **BASE)["latents"]
    bfloat16.close()
    assert relative_error(ours, sides["0.9.5"].ours(BASE, image)["latents"]) < 0.1


# The number of latents is no multiple of 16, so torch draws different numbers in bfloat16 and in float32.
ODD: dict[str, Any] = {**BASE, "height": 96, "width": 96, "num_frames": 17}
ODD_SHAPE = (1, 8, 3, 3, 3)


def drawn_noise(image: Image.Image | None) -> tuple[Tensor | None, Tensor]:
    """Noise of the image latents and of the decoder, for a bfloat16 request with seed 5."""
    generator, image_noise = torch.Generator().manual_seed(5), None
    if image is not None:
        image_noise = torch.randn((*ODD_SHAPE[:2], 1, *ODD_SHAPE[3:]), generator=generator, dtype=torch.bfloat16)
    torch.randn(ODD_SHAPE, generator=generator)
    return image_noise, torch.randn(ODD_SHAPE, generator=generator, dtype=torch.bfloat16)


@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
@pytest.mark.parametrize("version", ["0.9.0", "0.9.5"])
def test_bfloat16_is_rounded_at_the_same_points_as_in_diffusers(
    sides: dict[str, Sides], version: str, image: Image.Image | None
) -> None:
    """Noise has the VAE's dtype. Float32 latents are denormalized before they are rounded and mixed with noise."""
    path = str(sides[version].fleet.model.checkpoint.path)
    bfloat16, pipeline = open_fleet(path, torch.bfloat16), LTXPipeline.from_pretrained(path, dtype=torch.bfloat16)
    given = ODD | ({"decode_timestep": 0.05, "decode_noise_scale": 0.3} if version == "0.9.5" else {})
    ours = bfloat16.tensors(images=NO_IMAGES if image is None else {"image": png(image)}, seed=5, **given)
    bfloat16.close()
    image_noise, noise = drawn_noise(image)
    raw, vae = LTXPipeline._unpack_latents(ours["latents"], *ODD_SHAPE[2:]), pipeline.vae
    decoded = LTXPipeline._denormalize_latents(raw, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    decoded, timestep = decoded.bfloat16(), None
    if version == "0.9.5":
        scale, timestep = torch.tensor(0.3).bfloat16(), torch.tensor([0.05]).bfloat16()
        decoded = (1 - scale) * decoded + scale * noise
    with torch.inference_mode():
        video = vae.decode(decoded, timestep, return_dict=False)[0]
        theirs = pipeline.video_processor.postprocess_video(video, output_type="pt")
        assert torch.equal(ours["pixels"].float(), theirs.float())
        if image is not None and image_noise is not None:
            pixels = pipeline.video_processor.preprocess(image, height=96, width=96).bfloat16()
            posterior = vae.encode(pixels[:, :, None]).latent_dist
            first = (posterior.mean + posterior.std * image_noise).float()
            first = LTXPipeline._normalize_latents(first, vae.latents_mean, vae.latents_std)
            assert torch.equal(raw[:, :, :1], first)


@pytest.mark.parametrize(
    ("module", "change", "message"),
    [
        ("vae", {"decoder_inject_noise": [True, False]}, "decoder_inject_noise"),
        ("vae", {"patch_size_t": 2}, "patch_size_t"),
        ("vae", {"spatial_compression_ratio": 16}, "spatial_compression_ratio"),
        ("vae", {"decoder_spatio_temporal_scaling": [True, True]}, "spatial_compression_ratio"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("vae", {"latent_channels": 16}, "are not 16, the VAE's latent channels"),
        ("text_encoder", {"d_model": 48}, "text_encoder: 48 text features are not 32"),
    ],
    ids=str,
)
def test_inconsistent_modules_are_refused(
    tmp_path: Path, sides: dict[str, Sides], module: str, change: dict[str, Any], message: str
) -> None:
    source = sides["0.9.0"].fleet.model.checkpoint.path
    for entry in source.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / module).unlink()
    (tmp_path / module).mkdir()
    for entry in (source / module).iterdir():
        (tmp_path / module / entry.name).write_bytes(entry.read_bytes())
    edit_json(tmp_path / module / "config.json", **change)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        LTXVideoPipelineConfig.from_checkpoint(checkpoint)
