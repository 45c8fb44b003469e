"""Parity of the Qwen-Image DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel as Reference

from common.artifacts import Sampling
from common.errors import CheckpointError
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.vaes.qwen_image import AutoencoderKLQwenImageConfig
from configs.pipeline_configs.base import Step
from configs.pipeline_configs.packed import SequenceShift
from configs.pipeline_configs.qwen_image import QwenImagePipelineConfig, check_flags
from local_fleet import relative_error
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
SAMPLING = Sampling(num_inference_steps=4, seed=0)


def pair(path: Path, dtype: torch.dtype) -> tuple[Reference, QwenImageTransformer2DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, torch_dtype=dtype)
    with torch.device("meta"):
        ours = QwenImageTransformer2DModel(QwenImageTransformerConfig.from_dict("transformer", dict(reference.config)))
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), torch.device("cpu"), dtype)
    return reference, ours


def pipeline_config() -> QwenImagePipelineConfig:
    """A pipeline config whose VAE has 4 latent channels."""
    transformer = QwenImageTransformerConfig.from_dict("transformer", SIZES)
    statistics = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    vae = AutoencoderKLQwenImageConfig(z_dim=4, spatial_factor=8, **statistics)
    return QwenImagePipelineConfig(transformer=transformer, vae=vae, shift=SequenceShift())


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (7, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, grid: tuple[int, int], dtype: torch.dtype, max_error: float
) -> None:
    reference, ours = pair(tmp_path, dtype)
    rows, columns = grid
    latents = torch.randn(2, rows * columns, 16, dtype=dtype)
    text = torch.randn(2, 9, 24, dtype=dtype)
    timestep = torch.tensor([0.75, 0.75])  # exact in bfloat16; Diffusers rounds timesteps to the latents' dtype
    embeds = {"encoder_hidden_states": text}
    own = pipeline_config().prepare_pos_cond_kwargs(embeds, {"image": (2, 1, 4, 2 * rows, 2 * columns)}, SAMPLING)
    with torch.inference_mode():
        shapes = [[(1, rows, columns)]] * 2
        expected = reference(latents, text, timestep=timestep, img_shapes=shapes, return_dict=False)[0]
        got = ours(latents, timestep, **embeds, **own)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_parameters_of_the_published_size_match_diffusers() -> None:
    """Names and shapes with default arguments, which are Qwen-Image's architecture."""
    with torch.device("meta"):
        theirs, ours = Reference(), QwenImageTransformer2DModel(QwenImageTransformerConfig())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert QwenImageTransformerConfig.from_dict("transformer", dict(theirs.config)) == QwenImageTransformerConfig()


def test_conditioning_and_config_keywords_are_the_parameters_of_forward() -> None:
    config = pipeline_config()
    embeds = {"encoder_hidden_states": torch.zeros(1, 5, 24)}
    assert {encoding.keyword for encoding in config.text_encodings} == embeds.keys()
    shapes = {"image": (1, 1, 4, 6, 8)}
    own = dict(config.prepare_pos_cond_kwargs(embeds, shapes, SAMPLING))
    assert own.keys() == config.prepare_neg_cond_kwargs(embeds, shapes, SAMPLING).keys()
    parameters = inspect.signature(QwenImageTransformer2DModel.forward).parameters.keys() - {"self"}
    # Positions of input images, which this pipeline does not have.
    assert own.pop("condition_ids") is None
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep", "condition_states", "condition_ids"} == parameters


def test_packing_and_unpacking_move_the_frame_axis() -> None:
    """Noise is drawn with frames before channels; the VAE expects channels before frames."""
    config = pipeline_config()
    raw = torch.randn(2, 1, 4, 6, 8)
    packed = config.pack("image", raw)
    assert packed.shape == (2, 12, 16)
    assert torch.equal(packed[0, 0], raw[0, 0, :, :2, :2].flatten())
    assert torch.equal(config.unpack("image", packed, tuple(raw.shape)), raw.transpose(1, 2))


def test_guidance_preserves_the_norm_of_each_token() -> None:
    positive, negative = torch.randn(2, 1, 5, 16).unbind(0)
    predictions = {"positive": {"image": positive}, "negative": {"image": negative}}
    step = Step(0, 1000.0, {"image": 1.0}, {"image": 0.75})
    sampling = Sampling(num_inference_steps=4, seed=0, true_cfg_scale=7.0)
    guided = pipeline_config().guide(predictions, {"image": positive}, step, sampling)["image"]
    assert torch.allclose(guided.norm(dim=-1), positive.norm(dim=-1))
    assert not torch.allclose(guided, positive, atol=0.1)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"zero_cond_t": 1}, "zero_cond_t"),
        ({"patch_size": 1}, "patch_size"),
        ({"axes_dims_rope": [16, 56]}, "axes_dims_rope"),
    ],
    ids=str,
)
def test_unsupported_architectures_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        QwenImageTransformerConfig.from_dict("transformer", values)


@pytest.mark.parametrize("flag", ["zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_transformers_of_other_pipelines_are_refused(flag: str) -> None:
    transformer = QwenImageTransformerConfig.from_dict("transformer", {flag: True})
    with pytest.raises(CheckpointError, match=f"transformer/config.json: {flag}: True is not False"):
        check_flags(transformer, QwenImagePipelineConfig.transformer_flags)
