"""Parity of the Wan DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel as Reference
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError
from configs.models.dits.wan import WanTransformerConfig
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig, WanPipelineConfig
from local_fleet import relative_error
from models.catalog import open_model
from models.dits.wan import FLOAT32_PARAMETERS, UNUSED_PARAMETERS, WanTransformer3DModel
from models.registry import load_registry
from models.weights import load_module
from tiny_flux import randomize
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v

TEXT = {"in_channels": 16}
IMAGE = {"in_channels": 36, "image_dim": 24, "added_kv_proj_dim": 32}
TWO_IMAGES = {**IMAGE, "pos_embed_seq_len": 10}
BLOCKS: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
    "out_channels": 16,
}
CPU = torch.device("cpu")


def pair(path: Path, given: dict[str, Any], dtype: torch.dtype) -> tuple[Reference, WanTransformer3DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**BLOCKS, **given)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, dtype=dtype)
    with torch.device("meta"):
        ours = WanTransformer3DModel(WanTransformerConfig.from_dict("transformer", dict(reference.config)))
    files = sorted(path.glob("*.safetensors"))
    load_module(ours, "transformer", files, CPU, dtype, keep_float32=FLOAT32_PARAMETERS, unused=UNUSED_PARAMETERS)
    return reference, ours


@pytest.mark.parametrize("given", [TEXT, IMAGE, TWO_IMAGES], ids=["text", "image", "two-images"])
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, given: dict[str, Any], dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, given, dtype)
    video = torch.randn(2, given["in_channels"], 3, 8, 6, dtype=dtype)
    text = torch.randn(2, 512, 16, dtype=dtype)
    tokens = torch.randn(2, 10, 24, dtype=dtype) if "image_dim" in given else None
    # Diffusers expects the tokens of two images as two batch rows.
    theirs = tokens.reshape(4, 5, 24) if tokens is not None and "pos_embed_seq_len" in given else tokens
    timestep = torch.tensor([900, 900])
    with torch.inference_mode():
        expected = reference(video, timestep, text, theirs, return_dict=False)[0]
        got = ours(video, timestep, text, tokens)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_text_of_any_length_is_separate_from_the_image(tmp_path: Path) -> None:
    """Diffusers treats the last 512 tokens as text; this project has separate inputs for text and image."""
    _, ours = pair(tmp_path, IMAGE, torch.float32)
    video, tokens = torch.randn(1, 36, 1, 4, 4), torch.randn(1, 10, 24)
    text = torch.randn(1, 6, 16)
    timestep = torch.tensor([500])
    with torch.inference_mode():
        short = ours(video, timestep, text, tokens)
        reordered = ours(video, timestep, text, tokens.flip(1))
        changed = ours(video, timestep, text.flip(2), tokens)
    assert relative_error(reordered, short) < 1e-5, "attention is invariant to the order of image tokens"
    assert relative_error(changed, short) > 1e-2


def test_weights_are_accepted_only_if_they_are_listed_as_unused(tmp_path: Path) -> None:
    pair(tmp_path, IMAGE, torch.float32)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"blocks.0.attn2.norm_added_q.weight": torch.ones(32)}, file)
    config = WanTransformerConfig.from_dict("transformer", {**BLOCKS, **IMAGE})
    for unused, is_refused in ((UNUSED_PARAMETERS, False), ((), True)):
        with torch.device("meta"):
            model = WanTransformer3DModel(config)
        if is_refused:
            with pytest.raises(CheckpointError, match="norm_added_q"):
                load_module(model, "transformer", [file], CPU, torch.float32, unused=unused)
        else:
            load_module(model, "transformer", [file], CPU, torch.float32, unused=unused)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"image_dim": 8}, "added_kv_proj_dim"),
        ({"num_layers": -1}, "num_layers"),
    ],
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        WanTransformerConfig.from_dict("transformer", values)


@pytest.mark.parametrize("i2v", [False, True], ids=["t2v", "i2v"])
def test_conditioning_and_config_keywords_are_the_parameters_of_forward(tmp_path: Path, i2v: bool) -> None:
    path = build_tiny_wan_i2v(tmp_path / "m") if i2v else build_tiny_wan(tmp_path / "m")
    kind = WanImageToVideoPipelineConfig if i2v else WanPipelineConfig
    config = kind.from_checkpoint(open_model(str(path), load_registry()).checkpoint)
    keywords = {encoding.keyword for encoding in config.text_encodings}
    if isinstance(config, WanImageToVideoPipelineConfig):
        keywords |= config.vision_tokens([torch.zeros(1, 17, 24)] * 3).keys()
    parameters = set(inspect.signature(WanTransformer3DModel.forward).parameters) - {"self"}
    optional = set() if i2v else {"encoder_hidden_states_image"}
    assert keywords | {"hidden_states", "timestep"} == parameters - optional


def test_a_transformer_of_the_other_task_is_refused(tmp_path: Path) -> None:
    checkpoint = open_model(str(build_tiny_wan(tmp_path / "m")), load_registry()).checkpoint
    with pytest.raises(CheckpointError, match=r"16 input and 16 output channels are not 36 and 16"):
        WanImageToVideoPipelineConfig.from_checkpoint(checkpoint)
