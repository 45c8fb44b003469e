"""Parity of all Qwen-Image-Layered stages with Diffusers' pipeline: same weights, seed and image.

Layers have at least 640 x 640 pixels; the tests reduce this in both implementations.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as reference
from PIL import Image
from torch import Tensor

from coarse_images import png
from common.artifacts import StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, InvalidInput
from common.stage import Call
from common.tensors import TORCH
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.vaes.qwen_image import AutoencoderKLQwenImageConfig, image_size_of_area
from configs.pipeline_configs.qwen_image import check_flags
from configs.pipeline_configs.qwen_image_layered import QwenImageLayeredPipelineConfig
from configs.sample.qwen_image_layered import QwenImageLayeredSamplingParams
from local_fleet import LocalFleet, RecordedCall, call_of, open_fleet, relative_error
from models.contracts import DenoisingInput
from models.encoder_runners import captions
from models.loader import load_stages
from models.runtime import Runtime
from models.validation import InputValidationStage
from step_checkpoints import step_checkpoints_to
from tiny_qwen_image import build_tiny_qwen_image_layered, open_layered_reference

SHRINK = 64
"""Factor by which pixel counts are reduced: 80 x 80 instead of 640 x 640."""
BASE: dict[str, Any] = {"prompt": "a red apple", "layers": 2, "num_inference_steps": 2}
GUIDED: dict[str, Any] = {"negative_prompt": "a blue car"}
LONG = "the old stone river on the moon and the red cat in a blue car " * 20
NOT_SERVED = {
    *("self", "image", "latents", "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds"),
    *("negative_prompt_embeds_mask", "attention_kwargs", "callback_on_step_end", "return_dict", "generator"),
    *("callback_on_step_end_tensor_inputs", "output_type"),
}


def transparent(width: int, height: int, seed: int = 1) -> Image.Image:
    tiles = np.random.default_rng(seed).integers(0, 256, (4, 5, 4), np.uint8)
    return Image.fromarray(tiles, "RGBA").resize((width, height), Image.Resampling.BICUBIC)


WIDE = transparent(90, 60)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Reduce the pixel counts of both implementations."""
    sizes = reference.calculate_dimensions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "calculate_dimensions", lambda area, ratio: sizes(area // SHRINK, ratio))
        patch.setattr(QwenImageLayeredSamplingParams, "pixels_of", lambda resolution: resolution**2 // SHRINK)
        yield


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    torch.set_num_threads(1)
    opened = open_fleet(str(build_tiny_qwen_image_layered(tmp_path_factory.mktemp("qwen") / "layered")))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pipeline(fleet: LocalFleet) -> Any:
    theirs = open_layered_reference(fleet.model.checkpoint.path)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def their_run(pipeline: Any, image: Image.Image, request: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run Diffusers' pipeline; returns the latents of the last step, and the pixels.

    A callback stores the latents, because output_type="latent" fails. Diffusers groups the layers of several outputs
    incorrectly, but returns them in the correct order; view() restores the groups.
    """
    latents: list[Tensor] = []

    def store_latents(_pipeline: Any, _step: int, _time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"])
        return {}

    generator = torch.Generator("cpu").manual_seed(5)
    call = call_of({**request}) | {"generator": generator, "output_type": "pt", "callback_on_step_end": store_latents}
    with torch.inference_mode():
        layers = torch.cat(pipeline(image=image, **call).images)
    return {"latents": latents[-1], "pixels": layers.view(len(latents[-1]), -1, *layers.shape[1:])}


CASES: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "guided": (WIDE, GUIDED),
    "guidance with normalization, four layers": (WIDE, {**GUIDED, "cfg_normalize": True, "layers": 4}),
    "tall, long prompt, one layer": (transparent(50, 200), {"prompt": LONG, "layers": 1}),
    "two outputs, sigmas": (
        transparent(64, 64),
        {"num_outputs_per_prompt": 2, "sigmas": (1.0, 0.6, 0.3), "num_inference_steps": 3},
    ),
    "resolution 1024, few tokens": (WIDE, {"resolution": 1024, "max_sequence_length": 4, "layers": 1}),
    "Chinese caption": (WIDE, {"prompt": ""}),
    "English caption, guidance": (transparent(64, 64, seed=3), {"prompt": " ", "use_en_prompt": True, **GUIDED}),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_and_pixels_match_diffusers(fleet: LocalFleet, pipeline: Any, case: str) -> None:
    image, change = CASES[case]
    request = BASE | change
    theirs = their_run(pipeline, image, request)
    ours = fleet.tensors(images={"image": png(image)}, seed=5, **request)
    for name in ("latents", "pixels"):
        assert ours[name].shape == theirs[name].shape
    assert relative_error(ours["latents"], theirs["latents"]) <= 1e-4
    assert float((ours["pixels"] - theirs["pixels"]).abs().max()) <= 1e-3
    assert float(theirs["pixels"].std()) > 0.05, "flat layers would prove nothing"


def test_every_input_changes_the_result(fleet: LocalFleet) -> None:
    def latents(image: Image.Image = WIDE, **change: Any) -> Tensor:
        return fleet.tensors(images={"image": png(image)}, seed=5, **BASE | GUIDED | change)["latents"]

    before = latents()
    opaque = WIDE.copy()
    opaque.putalpha(255)
    for after in (
        latents(opaque),
        latents(prompt="a blue apple"),
        latents(negative_prompt="a red car"),
        latents(prompt=""),
        latents(cfg_normalize=True),
    ):
        assert relative_error(after, before) > 1e-3


def test_each_layer_is_a_png_with_transparency(fleet: LocalFleet) -> None:
    request = {**BASE, "num_outputs_per_prompt": 2, "seed": 5}
    items = fleet.media(images={"image": png(WIDE)}, **request).items
    assert len(items) == 2 * 2
    pixels = fleet.tensors(images={"image": png(WIDE)}, **request)["pixels"]
    for item, expected in zip(items, pixels.flatten(0, 1), strict=True):
        layer = Image.open(io.BytesIO(item.data.numpy().tobytes()))
        assert (layer.mode, layer.format, layer.size) == ("RGBA", "PNG", (item.width, item.height))
        assert item.num_frames == 1
        assert np.abs(np.asarray(layer) / 255 - expected.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_a_caption_replaces_an_empty_prompt_as_in_diffusers_and_is_reported(fleet: LocalFleet, pipeline: Any) -> None:
    recorded = RecordedCall()
    fleet.media(recorded, {"image": png(WIDE)}, **BASE | {"prompt": ""}, seed=1)
    ((field, message),) = recorded.warnings
    size = InputValidationStage(fleet.model).run({}, {"image": png(WIDE)}).params
    resized = WIDE.resize((size.width, size.height), Image.Resampling.LANCZOS)
    with torch.inference_mode():
        caption = pipeline.get_image_caption(resized, use_en_prompt=False, device="cpu")
    assert caption
    assert (field, message) == ("prompt", f"the prompt is empty; a caption of the image is used instead: {caption}")
    assert [token for token, total in recorded.progress if total == captions.MAX_CAPTION_TOKENS][:2] == [1, 2]
    assert recorded.progress[-3:] == [(1, 2), (2, 2), (1, 1)]


def test_caption_prompts_match_diffusers(pipeline: Any) -> None:
    assert pipeline.image_caption_prompt_en == captions.ENGLISH
    assert pipeline.image_caption_prompt_cn == captions.CHINESE


def loop_input(fleet: LocalFleet, call: Call, **change: Any) -> DenoisingInput:
    """The loop's input for a request."""
    images = {"image": png(WIDE)}
    validated = InputValidationStage(fleet.model).run({**BASE, "num_inference_steps": 3, "seed": 3, **change}, images)
    values: dict[str, Any] = dict(validated.artifacts)
    outputs = fleet.services["before_denoising"].of("").run(values, call)
    return DenoisingInput(**outputs, sampling=values["sampling"])


def test_a_loop_resumes_after_every_step_and_ends_within_a_step_when_cancelled(fleet: LocalFleet) -> None:
    x = loop_input(fleet, Call("test"), **GUIDED)
    assert x.image_latents is not None
    assert x.initial_latents.parts["image"].raw_latent_shape[1] == 3
    (stage,) = load_stages(fleet.model, fleet.model.service("denoising"), Runtime(step_checkpoint_every=1))
    states: list[StepCheckpoint] = []
    whole = (
        stage.run(x, Call("test", on_item=step_checkpoints_to(states.append))).denoised_latents.parts["image"].latents
    )
    assert [state.step for state in states] == [1, 2]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        resumed = stage.run(DenoisingInput(**vars(x) | {"resume_from": sent}), Call("test"))
        assert torch.equal(resumed.denoised_latents.parts["image"].latents, whole)
    steps: list[int] = []

    def on_progress(step: int, _: int) -> None:
        steps.append(step)
        call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        stage.run(x, call)
    assert steps == [1]


def test_cancellation_after_a_token_ends_the_caption(fleet: LocalFleet) -> None:
    recorded: list[int] = []

    def on_progress(token: int, _: int) -> None:
        recorded.append(token)
        call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        loop_input(fleet, call, prompt="")
    assert recorded == [1]


def test_every_supported_argument_of_diffusers_is_a_parameter_with_the_same_default(fleet: LocalFleet) -> None:
    arguments = inspect.signature(QwenImageLayeredPipeline.__call__).parameters
    renamed = {"num_images_per_prompt": "num_outputs_per_prompt"}
    specs = {spec.name: spec for spec in QwenImageLayeredSamplingParams.parameters(fleet.model.checkpoint)}
    served = {renamed.get(name, name) for name in arguments.keys() - NOT_SERVED}
    # height and width must equal the size that is computed from image and resolution.
    assert served | {"seed", "output_format", "height", "width"} == specs.keys()
    for name in arguments.keys() - NOT_SERVED - {"guidance_scale", "prompt"}:
        assert specs[renamed.get(name, name)].default == arguments[name].default, name


def test_the_size_is_computed_from_image_and_resolution(fleet: LocalFleet) -> None:
    stage = InputValidationStage(fleet.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenImageLayeredSamplingParams, "pixels_of", lambda resolution: resolution**2)
        for resolution in (640, 1024):
            validated = stage.run({"resolution": resolution}, {"image": png(WIDE)})
            assert (validated.params.height, validated.params.width) == image_size_of_area(60, 90, resolution**2)
            rebuilt = stage.run(validated.params.as_mapping(), {"image": png(WIDE)})
            assert rebuilt.params == validated.params


IMAGE = {"image": png(WIDE)}


@pytest.mark.parametrize(
    ("change", "images", "field", "message"),
    [
        ({}, {}, "image", "image: no image was sent"),
        ({}, {**IMAGE, "image_1": png(WIDE)}, "image_1", "image, image_1 is not a set of images"),
        ({}, {"image": b"no image"}, "image", "is not a PNG, JPEG or WebP"),
        ({}, {"image": png(Image.new("RGB", (9000, 8000)))}, "image", "9000 x 8000 is not at most"),
        ({"layers": 0}, IMAGE, "layers", "from 1 to 20"),
        ({"layers": 21}, IMAGE, "layers", "from 1 to 20"),
        ({"layers": 2.5}, IMAGE, "layers", "from 1 to 20"),
        ({"resolution": 768}, IMAGE, "resolution", "768 is not supported; 640 or 1024 works"),
        ({"resolution": "large"}, IMAGE, "resolution", "'large' is not supported; 640 or 1024 works"),
        ({"height": 96}, IMAGE, "height", "height: 96 is not the height computed from the image and resolution; 64 or"),
        ({"num_inference_steps": 1}, IMAGE, "num_inference_steps", "at least 2"),
        ({"output_format": "mp4"}, IMAGE, "output_format", "png or safetensors"),
    ],
    ids=[
        "no image",
        "two images",
        "not an image file",
        "large image",
        "no layers",
        "too many layers",
        "fractional layers",
        "unsupported resolution",
        "resolution as text",
        "other height",
        "one step",
        "mp4",
    ],
)
def test_unsupported_requests_are_refused(
    fleet: LocalFleet, change: dict[str, Any], images: dict[str, bytes], field: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        InputValidationStage(fleet.model).run({**BASE, **change}, images)
    assert caught.value.field == field


def test_configs_of_other_pipelines_are_refused() -> None:
    flags = QwenImageLayeredPipelineConfig.transformer_flags
    with pytest.raises(CheckpointError, match="use_layer3d_rope: False is not True"):
        check_flags(QwenImageTransformerConfig.from_dict("transformer", {}), flags)
    with pytest.raises(CheckpointError, match="input_channels: 3 is not 4"):
        AutoencoderKLQwenImageConfig.from_dict("vae", {"input_channels": 3}, QwenImageLayeredPipelineConfig.channels)
