"""Parity of the Z-Image DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel as Reference
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.z_image import ZImageTransformerConfig
from local_fleet import relative_error
from models.dits.z_image import ZImageTransformer2DModel
from models.layers.linear import absent_biases
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
}


def pair(path: Path, dtype: torch.dtype) -> tuple[Reference, ZImageTransformer2DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    with torch.device("meta"):
        ours = ZImageTransformer2DModel(ZImageTransformerConfig.from_dict("transformer", dict(reference.config)))
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def keywords(grid: tuple[int, int], tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keyword arguments for two outputs.

    Position ids equal Diffusers': padded text has frames 1, 2, ..., the image the next frame, image padding (0, 0, 0).
    """
    rows, columns = grid
    text, image = (-(-length // 32) * 32 for length in (tokens, rows * columns))
    text_ids = torch.tensor([(1 + index, 0, 0) for index in range(text)])
    grid_ids = [(text + 1, row, column) for row in range(rows) for column in range(columns)]
    return {
        "hidden_states": torch.randn(2, 4, 2 * rows, 2 * columns, dtype=dtype),
        "timestep": torch.tensor([0.3, 0.3]),
        "encoder_hidden_states": torch.randn(2, tokens, 24, dtype=dtype),
        "text_ids": text_ids,
        "image_ids": torch.tensor(grid_ids + [(0, 0, 0)] * (image - rows * columns)),
    }


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [((4, 8), 32), ((3, 5), 9), ((1, 1), 33), ((7, 5), 1)],
    ids=["unpadded", "odd grid", "one image token", "one text token"],
)
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, grid: tuple[int, int], tokens: int, dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, dtype)
    given = keywords(grid, tokens, dtype)
    with torch.inference_mode():
        images, texts = given["hidden_states"][:, :, None], given["encoder_hidden_states"]
        rows = reference(list(images), given["timestep"], list(texts), return_dict=False)[0]
        got = ours(**given)
    assert got.dtype == dtype
    assert relative_error(got, torch.stack(rows)[:, :, 0]) <= max_error


def test_every_keyword_changes_the_prediction(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, torch.float32)
    given, other = (keywords((3, 5), 9, torch.float32) for _ in range(2))
    other |= {"timestep": torch.full((2,), 0.8), "text_ids": given["text_ids"] + 5, "image_ids": given["image_ids"] * 2}
    with torch.inference_mode():
        expected = ours(**given)
        for name, value in other.items():
            assert relative_error(ours(**given | {name: value}), expected) > 1e-3, name


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments; this project adds zero biases to layers without bias."""
    with torch.device("meta"):
        theirs, ours = Reference(), ZImageTransformer2DModel(ZImageTransformerConfig())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    absent = absent_biases(ours)
    assert {name: value.shape for name, value in ours.state_dict().items() if name not in absent} == expected
    assert not absent & expected.keys()
    assert ZImageTransformerConfig.from_dict("transformer", dict(theirs.config)) == ZImageTransformerConfig()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"all_patch_size": [2, 4]}, "all_patch_size"),
        ({"qk_norm": False}, "qk_norm"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ({"n_heads": 7}, "dim"),
        ({"axes_dims": [32, 48, 50]}, "axes_dims"),
        ({"axes_lens": [1024]}, "axes_lens"),
        ({"n_layers": "3"}, "n_layers"),
    ],
    ids=str,
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        ZImageTransformerConfig.from_dict("transformer", values)
