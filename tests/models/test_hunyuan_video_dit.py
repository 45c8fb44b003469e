"""Parity of the HunyuanVideo DiT with Diffusers' transformer, which gets padded text: same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel as Reference
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from local_fleet import relative_error
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "pooled_projection_dim": 12,
    "rope_axes_dim": (4, 6, 6),
}
PADDING = 5


def pair(path: Path, dtype: torch.dtype) -> tuple[Reference, HunyuanVideoTransformer3DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    config = HunyuanVideoTransformerConfig.from_dict("transformer", dict(reference.config))
    with torch.device("meta"):
        ours = HunyuanVideoTransformer3DModel(config)
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def keywords(grid: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keyword arguments for two outputs with different texts."""
    frames, rows, columns = grid
    return {
        "hidden_states": torch.randn(2, 4, frames, 2 * rows, 2 * columns, dtype=dtype),
        "timestep": torch.tensor([749.0, 749.0]),
        "encoder_hidden_states": torch.randn(2, tokens, 24, dtype=dtype),
        "pooled_projections": torch.randn(2, 12, dtype=dtype),
        "guidance": torch.tensor([6.0, 6.0]),
        "video_ids": torch.cartesian_prod(*(torch.arange(size) for size in grid)),
    }


@pytest.mark.parametrize(("grid", "tokens"), [((3, 2, 5), 9), ((1, 1, 1), 1)], ids=str)
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, grid: tuple[int, int, int], tokens: int, dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, dtype)
    given = keywords(grid, tokens, dtype)
    theirs = {name: value for name, value in given.items() if name != "video_ids"}
    text = given["encoder_hidden_states"]
    theirs["encoder_hidden_states"] = torch.cat((text, torch.randn(2, PADDING, 24, dtype=dtype)), dim=1)
    theirs["encoder_attention_mask"] = torch.tensor([[1.0] * tokens + [0.0] * PADDING] * 2)
    theirs["guidance"] = given["guidance"] * 1000
    with torch.inference_mode():
        expected = reference(**theirs, return_dict=False)[0]
        got = ours(**given)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_every_keyword_changes_the_prediction(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, torch.float32)
    given, other = (keywords((2, 2, 3), 9, torch.float32) for _ in range(2))
    other |= {"timestep": torch.full((2,), 250.0), "guidance": torch.ones(2), "video_ids": given["video_ids"] * 3}
    with torch.inference_mode():
        expected = ours(**given)
        for name, value in other.items():
            assert relative_error(ours(**given | {name: value}), expected) > 1e-3, name


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments."""
    with torch.device("meta"):
        theirs, ours = Reference(), HunyuanVideoTransformer3DModel(HunyuanVideoTransformerConfig())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    config = HunyuanVideoTransformerConfig.from_dict("transformer", dict(theirs.config))
    assert config == HunyuanVideoTransformerConfig()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"patch_size": 1}, "patch_size"),
        ({"patch_size_t": 2}, "patch_size_t"),
        ({"mlp_ratio": 2.0}, "mlp_ratio"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"image_condition_type": "token_replace"}, "image_condition_type"),
        ({"rope_axes_dim": [16, 56, 58]}, "rope_axes_dim"),
        ({"num_layers": "3"}, "num_layers"),
    ],
    ids=str,
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        HunyuanVideoTransformerConfig.from_dict("transformer", values)
