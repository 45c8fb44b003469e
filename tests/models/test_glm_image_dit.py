"""Parity of the GLM-Image DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import GlmImageTransformer2DModel as Reference
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.glm_image import GlmImageTransformerConfig
from local_fleet import relative_error
from models.dits.glm_image import GlmImageTransformer2DModel
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 32,
    "condition_dim": 16,
    "prior_vq_quantizer_codebook_size": 40,
}


def pair(path: Path, dtype: torch.dtype) -> tuple[Reference, GlmImageTransformer2DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    with torch.device("meta"):
        ours = GlmImageTransformer2DModel(GlmImageTransformerConfig.from_dict("transformer", dict(reference.config)))
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def keywords(grid: tuple[int, int], dtype: torch.dtype, *, tokens: int = 9, drop: bool = False) -> dict[str, Tensor]:
    """Keyword arguments for two outputs with different prior tokens."""
    rows, columns = grid
    return {
        "hidden_states": torch.randn(2, 4, 2 * rows, 2 * columns, dtype=dtype),
        "timestep": torch.tensor([749.0, 749.0]),
        "encoder_hidden_states": torch.randn(2, tokens, 24, dtype=dtype),
        "prior_token_id": torch.randint(40, (2, rows * columns)),
        "prior_token_drop": torch.full((2, rows * columns), drop),
        "target_size": torch.tensor([[16.0 * rows, 16.0 * columns]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (7, 1)], ids=str)
@pytest.mark.parametrize("drop", [False, True], ids=["prior", "dropped"])
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, grid: tuple[int, int], drop: bool, dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, dtype)
    given = keywords(grid, dtype, drop=drop)
    with torch.inference_mode():
        expected = reference(**given, return_dict=False)[0]
        got = ours(**given)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_every_keyword_changes_the_prediction(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, torch.float32)
    given, other = keywords((3, 5), torch.float32), keywords((3, 5), torch.float32, drop=True)
    other |= {"timestep": torch.full((2,), 250.0), "target_size": torch.full((2, 2), 512.0)}
    other["crop_coords"] = torch.full((2, 2), 64.0)
    with torch.inference_mode():
        expected = ours(**given)
        for name, value in other.items():
            assert relative_error(ours(**given | {name: value}), expected) > 1e-3, name


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments."""
    with torch.device("meta"):
        theirs, ours = Reference(), GlmImageTransformer2DModel(GlmImageTransformerConfig())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert GlmImageTransformerConfig.from_dict("transformer", dict(theirs.config)) == GlmImageTransformerConfig()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"patch_size": 1}, "patch_size"),
        ({"attention_head_dim": 42}, "attention_head_dim"),
        ({"time_embed_dim": 31}, "time_embed_dim"),
        ({"condition_dim": 15}, "condition_dim"),
        ({"num_layers": "3"}, "num_layers"),
    ],
    ids=str,
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        GlmImageTransformerConfig.from_dict("transformer", values)
