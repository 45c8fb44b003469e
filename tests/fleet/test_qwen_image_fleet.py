"""All pipelines of Qwen-Image: outputs of real services equal those of one process bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InvalidInput
from configs.pipeline_configs.qwen_image_edit import QwenImageEditPipelineConfig
from configs.sample.qwen_image_layered import QwenImageLayeredSamplingParams
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from tiny_qwen_image import (
    build_tiny_qwen_image,
    build_tiny_qwen_image_edit,
    build_tiny_qwen_image_edit_plus,
    build_tiny_qwen_image_layered,
)

GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car",
    "height": 32,
    "width": 48,
    "num_inference_steps": 2,
    "seed": 5,
}


def image_file(seed: int, image_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


LAYERS: dict[str, Any] = {"prompt": "a red apple", "layers": 2, "num_inference_steps": 2, "seed": 5}


CASES: dict[str, tuple[str, Mapping[str, bytes], dict[str, Any]]] = {
    "guided": ("image", {}, GIVEN),
    "two outputs, without guidance": ("image", {}, {**GIVEN, "true_cfg_scale": 1.0, "num_outputs_per_prompt": 2}),
    "edit": ("edit", {"image": image_file(1, "JPEG")}, GIVEN),
    "edit of two images": ("plus", {"image_1": image_file(2), "image": image_file(1, "JPEG")}, GIVEN),
    "layers, guided": ("layered", {"image": image_file(1)}, {**LAYERS, "negative_prompt": "a blue car"}),
    "layers, captioned": ("layered", {"image": image_file(2)}, {**LAYERS, "prompt": "", "use_en_prompt": True}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("qwen")
    paths = {
        "image": build_tiny_qwen_image(root / "image"),
        "edit": build_tiny_qwen_image_edit(root / "edit"),
        "plus": build_tiny_qwen_image_edit_plus(root / "plus"),
        "layered": build_tiny_qwen_image_layered(root / "layered"),
    }
    return {name: open_model(f"{name}={path}", load_registry()) for name, path in paths.items()}


@pytest.fixture(scope="module", autouse=True)
def _small_images() -> Iterator[None]:
    """Resize input images and layers to fewer tokens than Diffusers does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenImageLayeredSamplingParams, "pixels_of", lambda resolution: resolution**2 // 64)
        patch.setattr(QwenImageEditPipelineConfig, "vae_image_area", 160 * 160)
        yield


@pytest.fixture(scope="module")
def fleet(models: dict[str, ServedModel]) -> Iterator[ServedFleet]:
    with served_fleet(list(models.values())) as served:
        yield served


@pytest.mark.parametrize("case", CASES)
def test_tensors_equal_those_of_one_process(fleet: ServedFleet, models: dict[str, ServedModel], case: str) -> None:
    name, images, given = CASES[case]
    local = LocalFleet(models[name])
    expected = local.tensors(images=images, **given)
    local.close()
    got = fleet.generate(name, images=images, **given).tensors
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_images_are_png_and_warnings_are_returned(fleet: ServedFleet) -> None:
    parameters = {**GIVEN, "height": 47, "guidance_scale": 3.0, "num_outputs_per_prompt": 2}
    answer = fleet.generate("image", ".png", **parameters)
    assert [Image.open(io.BytesIO(data)).size for data in answer.files] == [(48, 32)] * 2
    assert [warning.field for warning in answer.warnings] == ["height", "guidance_scale"]


def test_layers_are_transparent_png_and_the_caption_is_a_warning(fleet: ServedFleet) -> None:
    parameters = {**LAYERS, "prompt": "", "layers": 3}
    answer = fleet.generate("layered", ".png", {"image": image_file(1)}, **parameters)
    assert [Image.open(io.BytesIO(data)).mode for data in answer.files] == ["RGBA"] * 3
    assert [warning.field for warning in answer.warnings] == ["prompt"]


@pytest.mark.parametrize(
    ("name", "images", "change", "field"),
    [
        ("image", {"image": image_file(1)}, {}, "images"),
        ("image", {}, {"num_inference_steps": 1}, "num_inference_steps"),
        ("edit", {}, {}, "image"),
        ("edit", {"image": image_file(1), "last_image": image_file(2)}, {}, "last_image"),
        ("plus", {"image_1": image_file(1)}, {}, "image"),
        ("plus", {"image": image_file(1), "image_1": b"none"}, {}, "image_1"),
        ("layered", {"image": image_file(1)}, {}, "height"),
    ],
    ids=[
        "unused image",
        "one step",
        "no image",
        "unknown role",
        "no first image",
        "not an image file",
        "wrong height",
    ],
)
def test_invalid_input_is_refused_at_submission(
    fleet: ServedFleet, name: str, images: dict[str, bytes], change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        fleet.generate(name, images=images, **{**GIVEN, **change})
    assert caught.value.field == field
