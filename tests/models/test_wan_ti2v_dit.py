"""Parity of the Wan DiT with Diffusers, with a separate timestep for the first latent frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel as Reference
from torch import Tensor

from configs.models.dits.wan import WanTransformerConfig
from local_fleet import relative_error
from models.dits.wan import FLOAT32_PARAMETERS, WanTransformer3DModel
from models.dits.wan_plan import WAN_PLAN
from models.layers.step_cache import CacheUse, StepCache
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh
from models.parallel.segment_lengths import SegmentScope
from models.parallel.sequence_parallel import shard_entry_points
from models.stages.step_memory import StepInputs
from models.weights import load_module
from tiny_flux import randomize

SIZES: dict[str, Any] = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 3,
}
CPU = torch.device("cpu")
BATCH, ROWS, COLUMNS = 2, 8, 6
FRAME_TOKENS = ROWS // 2 * COLUMNS // 2


def pair(path: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> tuple[Reference, WanTransformer3DModel]:
    """Diffusers' transformer and this project's DiT with the same random weights."""
    torch.manual_seed(0)
    random_model = Reference(**SIZES | sizes)
    randomize(random_model)
    random_model.save_pretrained(path)
    reference = Reference.from_pretrained(path, dtype=dtype)
    with torch.device("meta"):
        ours = WanTransformer3DModel(WanTransformerConfig.from_dict("transformer", dict(reference.config)))
    files = sorted(path.glob("*.safetensors"))
    load_module(ours, "transformer", files, CPU, dtype, keep_float32=FLOAT32_PARAMETERS)
    return reference, ours


def inputs(frames: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random latents and text embeddings."""
    torch.manual_seed(1)
    video = torch.randn(BATCH, SIZES["in_channels"], frames, ROWS, COLUMNS)
    return video.to(dtype), torch.randn(BATCH, 20, SIZES["text_dim"]).to(dtype)


def timestep_per_token(timestep: Tensor, frames: int) -> Tensor:
    """Expand timesteps (B, 2) of two segments to Diffusers' shape (B, tokens)."""
    first, rest = timestep[:, :1], timestep[:, 1:]
    return torch.cat((first.expand(-1, FRAME_TOKENS), rest.expand(-1, (frames - 1) * FRAME_TOKENS)), dim=1).float()


@pytest.mark.parametrize("frames", [3, 1], ids=["3-frames", "1-frame"])
@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_predictions_match_diffusers(
    tmp_path: Path, frames: int, cross_attn_norm: bool, dtype: torch.dtype, max_error: float
) -> None:
    """Each batch row has its own timestep."""
    reference, ours = pair(tmp_path, dtype, cross_attn_norm=cross_attn_norm)
    video, text = inputs(frames, dtype)
    timestep = torch.tensor([[0, 900], [30, 750]])
    with torch.inference_mode():
        expected = reference(video, timestep_per_token(timestep, frames), text, return_dict=False)[0]
        got = ours(video, timestep, text)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= max_error


def test_one_timestep_equals_equal_timesteps_of_all_tokens(tmp_path: Path) -> None:
    """Without an image, Diffusers passes (B, tokens) timesteps that are all equal."""
    reference, ours = pair(tmp_path)
    video, text = inputs(3)
    timestep = torch.tensor([900, 750])
    both = timestep[:, None].expand(-1, 2)
    with torch.inference_mode():
        expected = reference(video, timestep_per_token(both, 3), text, return_dict=False)[0]
        one, two = ours(video, timestep, text), ours(video, both, text)
    assert relative_error(one, expected) <= 1e-6
    assert relative_error(two, one) <= 1e-6


def test_exchanged_timesteps_of_the_segments_change_the_prediction(tmp_path: Path) -> None:
    _, ours = pair(tmp_path)
    video, text = inputs(3)
    timestep = torch.tensor([[0, 900], [0, 900]])
    with torch.inference_mode():
        assert relative_error(ours(video, timestep.flip(1), text), ours(video, timestep, text)) > 1e-2


def test_prepared_steps_equal_single_predictions(tmp_path: Path) -> None:
    """prepare() takes timesteps (steps, B, 2): one row per step, with both segments."""
    _, ours = pair(tmp_path)
    video, text = inputs(3)
    timesteps = torch.tensor([[[0, 900], [0, 900]], [[0, 750], [0, 750]]])
    with torch.inference_mode():
        prepared = ours.prepare(timesteps, text)
        for step in range(2):
            got = ours.predict(video, use=None, **prepared.inputs(step))["hidden_states"]
            assert relative_error(got, ours(video, timesteps[step], text)) <= 1e-6


def test_graphs_of_one_and_of_two_segments_have_different_keys(tmp_path: Path) -> None:
    _, ours = pair(tmp_path)
    video, text = inputs(3)
    keys = set()
    for timestep in (torch.tensor([[9, 9]]), torch.tensor([[[0, 9], [0, 9]]])):
        with torch.inference_mode():
            prepared = ours.prepare(timestep, text)
        step = StepInputs({"hidden_states": video}, prepared.row(0), prepared.constants, prepared.memory, {})
        keys.add(step.key("transformer", is_cached=False))
    assert len(keys) == 2


def test_a_step_cache_changes_no_bit_of_a_computed_step(tmp_path: Path) -> None:
    _, ours = pair(tmp_path)
    video, text = inputs(3)
    cache = StepCache()
    with torch.inference_mode():
        prepared = ours.prepare(torch.tensor([[[0, 900], [0, 900]]]), text)
        given: dict[str, Any] = {"hidden_states": video, **prepared.inputs(0)}
        expected = ours.predict(**given)["hidden_states"]
        assert torch.equal(ours.predict(**given, use=CacheUse(cache, probe=False))["hidden_states"], expected)
        assert relative_error(ours.predict(**given, use=CacheUse(cache, probe=True))["hidden_states"], expected) < 1e-6
        assert cache.change() == 0


def test_segment_lengths_do_not_persist_between_requests(tmp_path: Path) -> None:
    """One transformer serves requests with and without images; segment lengths belong to the prediction."""
    _, ours = pair(tmp_path)
    video, text = inputs(3)
    requests = [torch.tensor([9, 9]), torch.tensor([[0, 9], [0, 9]])]
    with torch.inference_mode():
        expected = [ours(video, timestep, text) for timestep in requests]
    scope = SegmentScope(1, 0)
    shard_entry_points(ours, WAN_PLAN, WorkerMesh(Degrees(), CPU, 0, {axis: Axis() for axis in AXES}), scope)
    lengths = []
    ours.blocks[0].register_forward_hook(lambda *_: lengths.append(scope.current.lengths))
    for index in (1, 0, 1):
        with torch.inference_mode():
            assert torch.equal(ours(video, requests[index], text), expected[index])
    both, one = ({"video": (3 - first) * FRAME_TOKENS, "first_frame": first * FRAME_TOKENS} for first in (1, 0))
    assert lengths == [both, one, both]
