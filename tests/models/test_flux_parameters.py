"""Parity of FluxSamplingParams with the installed Diffusers' FluxPipeline: defaults, rounding, limits."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.pipelines.flux import pipeline_flux

from bare_checkpoint import build_bare_flux
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.sample.flux import FluxSamplingParams, vae_scale_factor

RENAMED = {"num_images_per_prompt": "num_outputs_per_prompt"}
# Arguments without a request parameter: tensors, adapter images, callbacks and the form of the return value.
NOT_SERVED = {
    "latents",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
    "joint_attention_kwargs",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "return_dict",
    "self",
    # Requests have seed and output_format instead.
    "generator",
    "output_type",
}


def pipeline_with(vae_blocks: int) -> FluxPipeline:
    """Diffusers' pipeline whose only module is a VAE with `vae_blocks` blocks."""
    block_types = {
        "down_block_types": ["DownEncoderBlock2D"] * vae_blocks,
        "up_block_types": ["UpDecoderBlock2D"] * vae_blocks,
    }
    vae = AutoencoderKL(block_out_channels=[4] * vae_blocks, norm_num_groups=2, **block_types)
    modules = dict.fromkeys(
        ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"), None
    )
    return FluxPipeline(vae=vae, **modules)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build_bare_flux(tmp_path_factory.mktemp("parameters") / "flux"))


def test_every_supported_argument_of_diffusers_is_a_parameter_with_the_same_default(flux: Checkpoint) -> None:
    arguments = inspect.signature(FluxPipeline.__call__).parameters
    specs = {spec.name: spec for spec in FluxSamplingParams.parameters(flux)}
    served = {RENAMED.get(name, name) for name in arguments.keys() - NOT_SERVED}
    assert served | {"seed", "output_format"} == specs.keys()
    for name in arguments.keys() - NOT_SERVED - {"height", "width"}:
        assert specs[RENAMED.get(name, name)].default == arguments[name].default, name


@pytest.mark.parametrize("vae_blocks", [2, 4])
def test_sizes_default_and_round_as_in_diffusers(
    tmp_path: Path, vae_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(pipeline_flux.logger, "warning", logged.append)
    theirs = pipeline_with(vae_blocks)
    checkpoint = Checkpoint.open(build_bare_flux(tmp_path / "flux", vae_blocks=vae_blocks))
    assert vae_scale_factor(checkpoint) == theirs.vae_scale_factor
    ours, _ = FluxSamplingParams.build({"prompt": ""}, checkpoint)
    assert ours.height == ours.width == theirs.default_sample_size * theirs.vae_scale_factor

    multiple = 2 * theirs.vae_scale_factor
    for height in (multiple, multiple + 1, 2 * multiple - 1, 2 * multiple, 7 * multiple + multiple // 2):
        width = 3 * multiple
        logged.clear()
        theirs.check_inputs("", None, height, width)
        _, ids = theirs.prepare_latents(1, 1, height, width, torch.float32, "cpu", torch.Generator().manual_seed(0))
        ours, warnings = FluxSamplingParams.build({"prompt": "", "height": height, "width": width}, checkpoint)
        assert [int(ids[:, axis].max() + 1) * multiple for axis in (1, 2)] == [ours.height, ours.width]
        assert bool(warnings) == bool(logged), height


def test_a_size_below_one_patch_is_refused(flux: Checkpoint) -> None:
    """Diffusers creates empty latents and fails later; this project raises InvalidInput."""
    theirs = pipeline_with(4)
    latents, _ = theirs.prepare_latents(1, 1, 15, 64, torch.float32, "cpu", torch.Generator().manual_seed(0))
    assert latents.numel() == 0
    with pytest.raises(InvalidInput, match=r"height: .* is not at least 16"):
        FluxSamplingParams.build({"prompt": "", "height": 15, "width": 64}, flux)


@pytest.mark.parametrize("length", [1, 512, 513])
def test_the_token_limit_equals_diffusers(flux: Checkpoint, length: int) -> None:
    refusals = []
    for check in (
        lambda: pipeline_with(4).check_inputs("", None, 64, 64, max_sequence_length=length),
        lambda: FluxSamplingParams.build({"prompt": "", "max_sequence_length": length}, flux),
    ):
        try:
            check()
        except (ValueError, InvalidInput) as error:
            refusals.append(str(error))
    assert len(refusals) == (2 if length > 512 else 0)
    assert all("max_sequence_length" in refusal and "513" in refusal for refusal in refusals)
