"""Parity of the FLUX.2 DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel as Reference
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.flux2 import Flux2TransformerConfig
from local_fleet import relative_error
from models.dits.flux2 import Flux2Transformer2DModel
from models.layers.linear import absent_biases
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
}


def pair(path: Path, dtype: torch.dtype, *, guidance_embeds: bool) -> tuple[Reference, Flux2Transformer2DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES, guidance_embeds=guidance_embeds)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    with torch.device("meta"):
        ours = Flux2Transformer2DModel(Flux2TransformerConfig.from_dict("transformer", dict(reference.config)))
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def image_ids(frame: int, rows: int, columns: int) -> Tensor:
    """Positions (frame, row, column, 0) of an image's tokens."""
    return torch.cartesian_prod(*(torch.arange(n) for n in (1, rows, columns, 1))) + torch.tensor([frame, 0, 0, 0])


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "klein"])
@pytest.mark.parametrize("references", [0, 2], ids=["text", "images"])
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, guidance_embeds: bool, references: int, dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, dtype, guidance_embeds=guidance_embeds)
    img_ids = torch.cat([image_ids(10 * index, 3 + index, 5) for index in range(1 + references)])
    txt_ids = torch.nn.functional.pad(torch.arange(9)[:, None], (3, 0))
    latents = torch.randn(2, len(img_ids), 16, dtype=dtype)
    given: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, 9, 24, dtype=dtype),
        # Diffusers rounds timesteps to the latents' dtype; 0.5 and 500 are exact in bfloat16.
        "timestep": torch.tensor([0.5, 0.5]),
        "guidance": torch.tensor([4.0, 4.0]) if guidance_embeds else None,
    }
    with torch.inference_mode():
        expected = reference(latents, img_ids=img_ids, txt_ids=txt_ids, return_dict=False, **given)[0]
        got = ours(latents, img_ids=img_ids.float(), txt_ids=txt_ids.float(), **given)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments, which are FLUX.2-dev's architecture."""
    with torch.device("meta"):
        theirs, ours = Reference(), Flux2Transformer2DModel(Flux2TransformerConfig())
    absent = absent_biases(ours)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items() if name not in absent} == expected
    assert Flux2TransformerConfig.from_dict("transformer", dict(theirs.config)) == Flux2TransformerConfig()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"mlp_ratio": 4.0}, "mlp_ratio"),
        ({"patch_size": 2}, "patch_size"),
        ({"eps": 1e-5}, "eps"),
        ({"axes_dims_rope": (16, 56, 56)}, "axes_dims_rope"),
        ({"timestep_guidance_channels": 255}, "timestep_guidance_channels"),
        ({"num_layers": -1}, "num_layers"),
    ],
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"transformer/config\.json: {field}"):
        Flux2TransformerConfig.from_dict("transformer", values)
