"""Warm-up requests have the shapes of real requests, and run before a worker is announced."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from async_tests import HANG_SECONDS
from common.artifacts import Canvas, ImageInputs, Prompt, Sampling
from common.errors import InvalidInput
from common.local import HostedStages
from common.stage import Call
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from models.catalog import ServedModel, open_model
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.predictor import merge_conditioning
from models.validation import InputValidationStage
from models.warm_up import STEPS, WarmUp
from redis_servers import running_server
from services.denoising import __main__ as denoising
from services.denoising.settings import DenoisingSettings
from services.worker import start_worker
from tiny_flux2 import build_tiny_flux2_dev, build_tiny_flux2_klein
from tiny_glm_image import build_tiny_glm_image
from tiny_ltx2 import build_tiny_ltx2
from tiny_qwen_image import build_tiny_qwen_image_edit, build_tiny_qwen_image_layered
from tiny_wan import build_tiny_wan_a14b_i2v, build_tiny_wan_i2v, build_tiny_wan_ti2v
from toy_checkpoint import build_toy_checkpoint, toy_family

CPU = torch.device("cpu")
Shapes = dict[str, dict[str, tuple[int, ...]]]


def opened(reference: object) -> ServedModel:
    return open_model(str(reference), load_registry())


def shapes_of(values: Mapping[str, Any]) -> Shapes:
    """Shapes of all graph inputs: conditioning of both branches, and latents by part."""
    shapes: Shapes = {"positive": {}, "negative": {}, "latents": {}}
    conditioning = merge_conditioning(values["text_conditioning"], values.get("image_conditioning"))
    shapes["positive"] = {name: tuple(value.shape) for name, value in conditioning.prompt_embeds.items()}
    shapes["negative"] = {name: tuple(value.shape) for name, value in conditioning.negative_prompt_embeds.items()}
    for slot in ("initial_latents", "image_latents"):
        for name, part in values[slot].parts.items() if slot in values else ():
            shapes["latents"][name] = (*part.latents.shape, *part.raw_latent_shape)
    return shapes


def real_inputs(model: ServedModel, params: Mapping[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Run the real stages before denoising; `image_size` is (width, height) of the input image."""
    values: dict[str, Any] = {
        "prompt": Prompt(prompt="a red apple", negative_prompt=""),
        "canvas": Canvas(**{name: params[name] for name in ("height", "width", "num_frames") if name in params}),
        "sampling": Sampling(num_inference_steps=STEPS, seed=0, guidance_scale=5.0, true_cfg_scale=1.0),
    }
    if image_size is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (image_size[1], image_size[0], 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        values["image_inputs"] = ImageInputs(images={"image": data})
    variant = InputValidationStage(model).choose((), () if image_size is None else ("image",))
    for spec in variant.services:
        if spec.service in ("denoising", "decoding"):
            break
        runtime = Runtime(device=CPU, dtype=torch.float32)
        stages = HostedStages(spec.service, load_stages(model, spec, runtime, variant=variant.name))
        given = {slot: values[slot] for slot in stages.contract.inputs if slot in values}
        values |= stages.run(given, Call("real"))
    return values


@pytest.mark.parametrize(
    ("build", "size", "image_size"),
    [
        (None, "32x48", None),
        (build_tiny_flux2_klein, "32x64@text", None),
        (build_tiny_flux2_klein, "64x96@image", (96, 64)),
        (build_tiny_flux2_dev, "64x96@image", (96, 64)),
        (build_tiny_glm_image, "32x64", None),
        (build_tiny_wan_i2v, "32x48x5", (48, 32)),
        (build_tiny_wan_a14b_i2v, "32x48x5@experts", (48, 32)),
        (build_tiny_wan_ti2v, "64x96x5@text", None),
        (build_tiny_wan_ti2v, "64x96x5@image", (48, 32)),
        (build_tiny_ltx2, "64x96x9@text", None),
        (build_tiny_ltx2, "64x96x9@image", (48, 32)),
    ],
    ids=[
        "flux",
        "flux2-klein-text",
        "flux2-klein-image",
        "flux2-dev-image",
        "glm-image",
        "wan-i2v",
        "wan-a14b-i2v",
        "wan-ti2v-text",
        "wan-ti2v-image",
        "ltx2-text",
        "ltx2-image",
    ],
)
def test_warm_up_requests_have_the_shapes_of_real_requests(
    tmp_path: Path, build: Callable[[Path], Path] | None, size: str, image_size: tuple[int, int] | None
) -> None:
    model = opened("emoji" if build is None else build(tmp_path / "model"))
    warm_up = WarmUp.parse(model, (size,))
    (warm_up_inputs,) = warm_up.inputs(torch.float32)
    assert shapes_of(warm_up_inputs) == shapes_of(real_inputs(model, warm_up.sizes[0][1].as_mapping(), image_size))


def test_a_warm_up_of_an_edit_has_image_latents_of_the_resized_image(tmp_path: Path) -> None:
    (warm_up_inputs,) = WarmUp.parse(opened(build_tiny_qwen_image_edit(tmp_path / "edit")), ("32x48",)).inputs(
        torch.bfloat16
    )
    shapes = shapes_of(warm_up_inputs)
    assert shapes["latents"]["image"] == (1, 6, 64, 1, 1, 16, 4, 6)
    # Diffusers resizes an image with this aspect ratio to 832 x 1248 pixels.
    assert shapes["latents"]["condition"] == (1, 52 * 78, 64, 1, 1, 16, 104, 156)
    assert shapes["positive"] == shapes["negative"], "guidance is on by default"
    assert warm_up_inputs["text_conditioning"].prompt_embeds["encoder_hidden_states"].dtype == torch.bfloat16


def test_a_warm_up_of_before_denoising_has_the_inputs_of_a_request(tmp_path: Path) -> None:
    """The warm-up of the denoising service has prior token ids of an integer dtype."""
    model = opened(build_tiny_glm_image(tmp_path / "glm"))
    (request,) = WarmUp.parse(model, ("32x64",), service="before_denoising").inputs(torch.float32)
    assert request.keys() == {"prompt", "canvas", "sampling"}
    assert (request["canvas"].height, request["canvas"].width) == (32, 64)
    (warm_up_inputs,) = WarmUp.parse(model, ("32x64",)).inputs(torch.bfloat16)
    embeds = warm_up_inputs["text_conditioning"].prompt_embeds
    assert {name: value.dtype for name, value in embeds.items()} == {
        "encoder_hidden_states": torch.bfloat16,
        "prior_token_id": torch.int64,
    }


def test_a_warm_up_of_before_denoising_has_an_image_if_the_model_takes_images(tmp_path: Path) -> None:
    """The prompt is empty, so the service captions the image. The denoising service gets latents of the same shapes."""
    model = opened(build_tiny_qwen_image_layered(tmp_path / "layered"))
    warm_up = WarmUp.parse(model, ("32x64",), service="before_denoising")
    (request,) = warm_up.inputs(torch.float32)
    assert request.keys() == {"prompt", "canvas", "sampling", "image_inputs"}
    spec = model.service("before_denoising")
    stages = HostedStages("before_denoising", load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32)))
    warnings: list[str] = []
    real = stages.run(request, Call("real", on_warning=lambda field, _: warnings.append(field)))
    assert warnings == ["prompt"]
    (warm_up_inputs,) = WarmUp.parse(model, ("32x64",)).inputs(torch.float32)
    assert shapes_of(warm_up_inputs)["latents"] == shapes_of(real)["latents"]
    assert warm_up_inputs["text_conditioning"].prompt_embeds.keys() == real["text_conditioning"].prompt_embeds.keys()


def test_a_warm_up_of_before_denoising_samples_every_token(tmp_path: Path) -> None:
    model = opened(build_tiny_glm_image(tmp_path / "glm"))
    spec = model.service("before_denoising")
    stages = HostedStages("before_denoising", load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32)))
    tokens: list[tuple[int, int]] = []
    call = Call("warm-up", on_progress=lambda *token: tokens.append(token))
    WarmUp.parse(model, ("32x64",), service="before_denoising").run(stages.run, torch.float32, call)
    assert tokens[-1] == (len(tokens), len(tokens))


def test_a_warm_up_runs_three_steps_at_each_size(caplog: pytest.LogCaptureFixture) -> None:
    model = opened("emoji")
    spec = model.service("denoising")
    stages = HostedStages("denoising", load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32)))
    steps: list[tuple[int, int]] = []
    call = Call("warm-up", on_progress=lambda *step: steps.append(step))
    with caplog.at_level(logging.INFO, "models.warm_up"):
        WarmUp.parse(model, ("16x32", "32x16")).run(stages.run, torch.float32, call)
    assert steps == [(1, 3), (2, 3), (3, 3)] * 2
    assert [line.rpartition(" seconds=")[0] for line in caplog.messages] == [
        "warmed up size=16x32",
        "warmed up size=32x16",
    ]


def test_a_rounded_size_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ((_, params),) = WarmUp.parse(opened("emoji"), ("35x32",)).sizes
    assert params.height == 32
    assert len(caplog.messages) == 1
    assert "35 is not a multiple of 16; 32 is used instead" in caplog.messages[0]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("large", "warm_up: 'large' is not a size; HEIGHTxWIDTH"),
        ("64x", "HEIGHTxWIDTH"),
        ("64x64x5", "warm_up: 64x64x5: FluxPipeline has no parameter 'num_frames'"),
        ("4x64", "warm_up: 4x64: height: 4 is not at least 16"),
        ("64x9999", "warm_up: 64x9999: width: 9999 is not a whole number from 1 to 8192"),
    ],
)
def test_an_invalid_warm_up_size_is_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str, message: str
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("the service started")

    monkeypatch.setattr(denoising, "serve", start)
    flags = ["--model", "emoji", "--redis", "unix:///x", "--device", "cpu", "--warm-up", "64x64", "--warm-up", size]
    assert denoising.main(flags) == 2
    assert message in capsys.readouterr().err


def test_a_warm_up_of_a_family_with_a_custom_loop_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as plugins:
        toy = open_model(f"toy={build_toy_checkpoint(tmp_path_factory.mktemp('toy'))}", load_registry([plugins]))
        assert WarmUp.parse(toy, ()).sizes == ()
        with pytest.raises(InvalidInput, match="no standard denoising stage"):
            WarmUp.parse(toy, ("64x64",))


def test_a_worker_warms_up_before_it_is_announced() -> None:
    """The warm-up requests run through the stages that the worker announces."""
    model = opened("emoji")

    async def live(url: str) -> int:
        async with connect(url) as redis:
            return len(await WorkerRegistry(redis).live("emoji", "denoising"))

    with running_server("valkey") as server:
        requests: list[tuple[str, int]] = []

        class Watched(WarmUp):
            def run(self, stages: Callable[[Mapping[str, Any], Call], object], dtype: torch.dtype, call: Call) -> None:
                super().run(stages, dtype, call)
                requests.append((call.request_id, asyncio.run(live(server.url))))

        async def test() -> None:
            settings = DenoisingSettings(model="emoji", redis=server.url, device="cpu", threads=1)
            worker = await start_worker("denoising", model, settings, warm_up=Watched.parse(model, ("16x16",)))
            try:
                assert requests == [("warm-up", 0)]
                assert await live(server.url) == 1
            finally:
                await worker.stop(0)

        asyncio.run(asyncio.wait_for(test(), HANG_SECONDS))
