"""Parity of the LTX-2 DiT with Diffusers' transformer on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel as Reference
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import CheckpointError
from configs.models.dits.ltx2 import LTX2TransformerConfig
from local_fleet import relative_error
from models.dits.ltx2 import LTX2VideoTransformer3DModel
from models.layers.step_cache import CacheUse, StepCache
from models.stages.step_memory import StepInputs
from models.weights import load_module
from tiny_flux import randomize
from tiny_ltx2 import AUDIO_CHANNELS, AUDIO_SIZE, CAPTION_SIZE, MEL_BINS, VIDEO_CHANNELS, VIDEO_SIZE, transformer_sizes

CPU = torch.device("cpu")
BATCH, FRAMES, ROWS, COLUMNS = 2, 3, 2, 5
AUDIO_LENGTH, TEXT_TOKENS = 7, 6
FPS = 25.0
VERSIONS = pytest.mark.parametrize("version", ["2.0", "2.3"])

Pair = tuple[Reference, LTX2VideoTransformer3DModel]


def pair(path: Path, version: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Pair:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**transformer_sizes(version == "2.3") | sizes)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, dtype=dtype)
    with torch.device("meta"):
        ours = LTX2VideoTransformer3DModel(LTX2TransformerConfig.from_dict("transformer", dict(reference.config)))
    load_module(ours, "transformer", sorted(path.glob("*.safetensors")), CPU, dtype)
    return reference, ours


def inputs(version: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random latents and text embeddings, by this project's argument names."""
    torch.manual_seed(1)
    widths = (CAPTION_SIZE, CAPTION_SIZE) if version == "2.0" else (VIDEO_SIZE, AUDIO_SIZE)
    given = {
        "hidden_states": torch.randn(BATCH, VIDEO_CHANNELS, FRAMES, ROWS, COLUMNS),
        "audio_hidden_states": torch.randn(BATCH, AUDIO_CHANNELS, AUDIO_LENGTH, MEL_BINS // 4),
        "encoder_hidden_states": torch.randn(BATCH, TEXT_TOKENS, widths[0]),
        "audio_encoder_hidden_states": torch.randn(BATCH, TEXT_TOKENS, widths[1]),
    }
    return {name: value.to(dtype) for name, value in given.items()} | {"fps": torch.tensor([FPS])}


def theirs(reference: Reference, given: dict[str, Tensor], timestep: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    """Diffusers' predictions in this project's shapes, for timesteps (B,) or (B, 2)."""
    call: dict[str, Any] = {name: value for name, value in given.items() if name != "fps"}
    call["hidden_states"] = call["hidden_states"].flatten(2).transpose(1, 2)
    call["audio_hidden_states"] = call["audio_hidden_states"].transpose(1, 2).flatten(2)
    sigma = timestep if timestep.ndim == 1 else timestep[:, 1]
    if timestep.ndim == 2:
        first, rest = timestep[:, :1], timestep[:, 1:]
        counts = (ROWS * COLUMNS, (FRAMES - 1) * ROWS * COLUMNS)
        timestep = torch.cat((first.expand(-1, counts[0]), rest.expand(-1, counts[1])), dim=1)
    others = {"use_cross_timestep": True, **others}
    with torch.inference_mode():
        video, audio = reference(
            **call,
            timestep=timestep,
            audio_timestep=sigma,
            sigma=sigma,
            num_frames=FRAMES,
            height=ROWS,
            width=COLUMNS,
            audio_num_frames=AUDIO_LENGTH,
            fps=FPS,
            return_dict=False,
            **others,
        )
    return (
        video.transpose(1, 2).unflatten(2, (FRAMES, ROWS, COLUMNS)),
        audio.unflatten(2, (AUDIO_CHANNELS, -1)).transpose(1, 2),
    )


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], max_error: float = 1e-6) -> None:
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == reference.dtype
        assert relative_error(ours, reference) <= max_error


@VERSIONS
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("has_image", [False, True], ids=["text", "image"])
def test_predictions_match_diffusers(
    tmp_path: Path, version: str, dtype: torch.dtype, max_error: float, has_image: bool
) -> None:
    """Each batch row has its own timestep. With an image, the first frame's tokens have a separate timestep."""
    reference, ours = pair(tmp_path, version, dtype)
    given = inputs(version, dtype)
    timestep = torch.tensor([[30.0, 900.5], [0.0, 750.25]]) if has_image else torch.tensor([900.5, 750.25])
    with torch.inference_mode():
        got = ours(**given, timestep=timestep)
    check(got, theirs(reference, given, timestep), max_error)


@VERSIONS
def test_guidance_branches_match_diffusers(tmp_path: Path, version: str) -> None:
    """Perturbed branch: blocks without self-attention (not in LTX-2.0). Isolated branch: no video-audio attention."""
    reference, ours = pair(tmp_path, version)
    given, timestep = inputs(version), torch.tensor([900.5, 750.25])
    with torch.inference_mode():
        whole = ours(**given, timestep=timestep)
        isolated = ours(**given, timestep=timestep, isolate_modalities=True)
        skipped = ours(**given, timestep=timestep, spatio_temporal_guidance_blocks=(0, 2))
    check(isolated, theirs(reference, given, timestep, isolate_modalities=True))
    assert all(relative_error(one, other) > 1e-2 for one, other in zip(isolated, whole, strict=True))
    assert all(relative_error(one, other) > 1e-2 for one, other in zip(skipped, whole, strict=True))
    if ours.config.skips_attention:
        check(skipped, theirs(reference, given, timestep, spatio_temporal_guidance_blocks=[0, 2]))


@VERSIONS
def test_predictions_with_and_without_cross_timestep_match_diffusers(tmp_path: Path, version: str) -> None:
    reference, ours = pair(tmp_path, version)
    given, timestep = inputs(version), torch.tensor([[0.0, 900.5], [0.0, 750.25]])
    results = []
    for use_cross_timestep in (True, False):
        with torch.inference_mode():
            results.append(ours(**given, timestep=timestep, use_cross_timestep=torch.tensor([use_cross_timestep])))
        check(results[-1], theirs(reference, given, timestep, use_cross_timestep=use_cross_timestep))
    assert relative_error(results[0][0], results[1][0]) > 1e-4


def test_predictions_with_masked_text_match_diffusers(tmp_path: Path) -> None:
    reference, ours = pair(tmp_path, "2.0")
    given, timestep = inputs("2.0"), torch.tensor([900.5, 750.25])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with torch.inference_mode():
        got = ours(**given, timestep=timestep, encoder_attention_mask=mask)
        whole = ours(**given, timestep=timestep)
    masks = {"encoder_attention_mask": mask, "audio_encoder_attention_mask": mask}
    check(got, theirs(reference, given, timestep, **masks))
    assert relative_error(got[0], whole[0]) > 1e-3


@pytest.mark.parametrize(
    "sizes",
    [
        {"pos_embed_max_pos": 7, "audio_pos_embed_max_pos": 30, "base_height": 512, "base_width": 700},
        {"rope_theta": 500.0, "rope_double_precision": False, "causal_offset": 0},
        {"rope_type": "interleaved"},
        {"cross_attn_timestep_scale_multiplier": 300},
        {"audio_cross_attn_mod": False},
        {"gated_attn": False, "cross_attn_mod": False},
        {"vae_scale_factors": [4, 16, 16], "audio_scale_factor": 2, "audio_hop_length": 200},
    ],
    ids=lambda sizes: ",".join(sizes),
)
def test_predictions_of_other_architectures_match_diffusers(tmp_path: Path, sizes: dict[str, Any]) -> None:
    reference, ours = pair(tmp_path, "2.3", **sizes)
    given, timestep = inputs("2.3"), torch.tensor([[30.0, 900.5], [0.0, 750.25]])
    with torch.inference_mode():
        got = ours(**given, timestep=timestep)
    check(got, theirs(reference, given, timestep))


def test_prepared_steps_equal_single_predictions(tmp_path: Path) -> None:
    """prepare() takes timesteps (steps, B, 2): one row per step, with both segments."""
    _, ours = pair(tmp_path, "2.3")
    given = inputs("2.3")
    latents = {name: given.pop(name) for name in ("hidden_states", "audio_hidden_states")}
    timesteps = torch.tensor([[[0.0, 900.0]] * 2, [[0.0, 750.0]] * 2])
    with torch.inference_mode():
        prepared = ours.prepare(timesteps, **given)
        for step in range(2):
            call: dict[str, Any] = {**latents, **prepared.inputs(step)}
            got = ours.predict(**call)
            check(
                (got["hidden_states"], got["audio_hidden_states"]), ours(**latents, **given, timestep=timesteps[step])
            )


def test_a_step_cache_changes_no_bit_of_a_computed_step(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "2.3")
    given = inputs("2.3")
    latents = {name: given.pop(name) for name in ("hidden_states", "audio_hidden_states")}
    cache = StepCache()
    with torch.inference_mode():
        prepared = ours.prepare(torch.tensor([[[0.0, 900.0]] * 2]), **given)
        call: dict[str, Any] = {**latents, **prepared.inputs(0)}
        expected = ours.predict(**call)
        computed = ours.predict(**call, use=CacheUse(cache, probe=False))
        reused = ours.predict(**call, use=CacheUse(cache, probe=True))
    for name, value in expected.items():
        assert torch.equal(computed[name], value)
        assert relative_error(reused[name], value) < 1e-6
    assert cache.change() == 0
    assert ours.residual_elements(latents, prepared.constants) == BATCH * (
        FRAMES * ROWS * COLUMNS * VIDEO_SIZE + AUDIO_LENGTH * AUDIO_SIZE
    )


@VERSIONS
def test_a_prediction_reads_no_value_on_the_host(tmp_path: Path, version: str) -> None:
    """CUDA graphs cannot capture host reads. FakeTensors have no values, so a host read raises an error."""
    _, ours = pair(tmp_path, version)
    given = inputs(version)
    latents = {name: given.pop(name) for name in ("hidden_states", "audio_hidden_states")}
    with torch.inference_mode():
        prepared = ours.prepare(torch.tensor([[[0.0, 900.0]] * 2]), **given)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        whole = {**latents, **prepared.inputs(0)}
        call: dict[str, Any] = {name: fake.from_tensor(each.clone()) for name, each in whole.items()}
        predicted = ours.predict(**call)
    assert {name: each.shape for name, each in predicted.items()} == {
        name: each.shape for name, each in latents.items()
    }


def test_graphs_of_one_and_of_two_segments_have_different_keys(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "2.3")
    given = inputs("2.3")
    latents = {name: given.pop(name) for name in ("hidden_states", "audio_hidden_states")}
    keys = set()
    for timesteps in (torch.full((1, BATCH), 9.0), torch.full((1, BATCH, 2), 9.0)):
        with torch.inference_mode():
            prepared = ours.prepare(timesteps, **given)
        step = StepInputs(latents, prepared.row(0), prepared.constants, prepared.memory, {})
        keys.add(step.key("transformer", is_cached=False))
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"patch_size": 2}, "patch_size: 2 is not 1"),
        ({"ff_bias": False}, "ff_bias: False is not True"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine: True is not False"),
        ({"audio_num_attention_heads": 2}, "audio_num_attention_heads: 2 is not 4, the value of num_attention_heads"),
        ({"cross_attention_dim": 30}, "cross_attention_dim: 30 is not 32, heads x head size"),
        ({"rope_type": "other"}, "rope_type: 'other' is not 'interleaved' or 'split'"),
        ({"vae_scale_factors": [8, 32, 16]}, "vae_scale_factors: .* as many rows as columns"),
    ],
)
def test_unsupported_architectures_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LTX2TransformerConfig.from_dict("transformer", transformer_sizes(True) | entry)
