"""A guidance scale of 1 runs one branch and a scale above 1 two branches, in six families.

Z-Image differs: it has guidance at any scale above 0; see test_z_image_loop.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local_fleet import LocalFleet
from models.catalog import open_model
from models.dits.base import DiffusionTransformer
from models.dits.flux import FluxTransformer2DModel
from models.dits.glm_image import GlmImageTransformer2DModel
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.dits.wan import WanTransformer3DModel
from models.registry import load_registry
from tiny_glm_image import build_tiny_glm_image
from tiny_hunyuan_video import build_tiny_hunyuan_video
from tiny_ltx_video import build_tiny_ltx_video
from tiny_qwen_image import build_tiny_qwen_image

STEPS = 2


def emoji(_: Path) -> str:
    return "emoji"


def emoji_video(_: Path) -> str:
    return "emoji-video"


def qwen_image(path: Path) -> str:
    return str(build_tiny_qwen_image(path / "qwen"))


def glm_image(path: Path) -> str:
    return str(build_tiny_glm_image(path / "glm"))


def hunyuan_video(path: Path) -> str:
    return str(build_tiny_hunyuan_video(path / "hunyuan"))


def ltx_video(path: Path) -> str:
    return str(build_tiny_ltx_video(path / "ltx"))


@pytest.mark.parametrize(
    ("reference", "transformer", "scale", "size"),
    [
        (emoji, FluxTransformer2DModel, "true_cfg_scale", {}),
        (emoji_video, WanTransformer3DModel, "guidance_scale", {"num_frames": 5}),
        (qwen_image, QwenImageTransformer2DModel, "true_cfg_scale", {}),
        (glm_image, GlmImageTransformer2DModel, "guidance_scale", {}),
        (hunyuan_video, HunyuanVideoTransformer3DModel, "true_cfg_scale", {"num_frames": 5}),
        (ltx_video, LTXVideoTransformer3DModel, "guidance_scale", {"num_frames": 9}),
    ],
)
def test_a_guidance_scale_of_1_runs_one_branch_and_above_1_two_branches(
    reference: Callable[[Path], str],
    transformer: type[DiffusionTransformer],
    scale: str,
    size: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = LocalFleet(open_model(reference(tmp_path), load_registry()))
    predict, calls = transformer.predict, 0

    def counted(self: DiffusionTransformer, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return predict(self, *arguments, **more)

    monkeypatch.setattr(transformer, "predict", counted)
    for value, branches in ((1.0, 1), (1.25, 2)):
        calls = 0
        given: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 1, "num_inference_steps": STEPS}
        given |= {"height": 32, "width": 32, "output_format": "safetensors", **size, scale: value}
        fleet.media(**given)
        assert calls == branches * STEPS, f"{scale}={value}"
