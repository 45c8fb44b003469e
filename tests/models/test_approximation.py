"""Approximate denoising of every family: float8 linears, step cache, errors, and refused families."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from torch import Tensor

from common.artifacts import StepCheckpoint
from common.errors import InvalidInput
from common.stage import Call
from configs.approximation import EXACT, Approximation
from configs.pipeline_configs.qwen_image_edit import QwenImageEditPipelineConfig
from local_fleet import relative_error
from models.catalog import ServedModel, open_model
from models.contracts import DenoisingInput
from models.kernels.float8_format import FLOAT8
from models.layers.linear import JoinedLinear, JoinsWeights
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.stages.loop_state import LoopState
from models.warm_up import STEPS, WarmUp
from services.denoising import __main__ as denoising
from services.denoising.settings import DenoisingSettings
from step_checkpoints import step_checkpoints_to
from tiny_flux import build_tiny_flux
from tiny_flux2 import build_tiny_flux2_klein
from tiny_glm_image import build_tiny_glm_image
from tiny_hunyuan_video import build_tiny_hunyuan_video
from tiny_ltx2 import build_tiny_ltx2
from tiny_ltx_video import build_tiny_ltx_video
from tiny_qwen_image import build_tiny_qwen_image, build_tiny_qwen_image_edit_plus
from tiny_wan import build_tiny_wan_i2v, build_tiny_wan_ti2v
from tiny_z_image import build_tiny_z_image
from toy_checkpoint import build_toy_checkpoint, toy_family

CPU = torch.device("cpu")
FLOAT8_LINEARS = Approximation("float8")
FAMILIES: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    "flux": (build_tiny_flux, "32x48", ("attn", "ff", "ff_context", "proj_mlp", "proj_out")),
    "flux2-klein": (build_tiny_flux2_klein, "32x48@image", ("attn", "ff", "ff_context")),
    "glm-image": (build_tiny_glm_image, "32x64", ("attn1", "ff")),
    "hunyuan-video": (build_tiny_hunyuan_video, "32x48x5", ("attn", "ff", "ff_context", "proj_mlp", "proj_out")),
    "qwen-image": (build_tiny_qwen_image, "32x48", ("attn", "img_mlp", "txt_mlp")),
    "qwen-image-edit-plus": (build_tiny_qwen_image_edit_plus, "32x48", ("attn", "img_mlp", "txt_mlp")),
    "z-image": (build_tiny_z_image, "32x64", ("attention", "feed_forward")),
    "wan": (build_tiny_wan_i2v, "32x48x5", ("attn1", "attn2", "ffn")),
    "wan-ti2v": (build_tiny_wan_ti2v, "64x96x5@image", ("attn1", "attn2", "ffn")),
    "ltx-video": (build_tiny_ltx_video, "64x96x9@image", ("attn1", "attn2", "ff")),
    "ltx2": (
        build_tiny_ltx2,
        "64x96x9@image",
        (
            *("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
            *("ff", "audio_ff"),
        ),
    ),
}
"""(checkpoint builder, warm-up size, submodule names of the large block layers) by family."""
Case = tuple[ServedModel, DenoisingInput, tuple[str, ...]]


@pytest.fixture(scope="module", autouse=True)
def _small_images() -> Iterator[None]:
    """Encode input images at fewer pixels than Diffusers, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QwenImageEditPipelineConfig, "vae_image_area", 96 * 96)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family's small model, the loop's input, and the submodule names of its large block layers."""
    torch.set_num_threads(1)
    build, size, layers = FAMILIES[request.param]
    model = open_model(str(build(tmp_path_factory.mktemp("model") / request.param)), load_registry())
    (inputs,) = WarmUp.parse(model, (size,)).inputs(torch.float32)
    return model, DenoisingInput(**inputs), layers


def stage_of(model: ServedModel, approximation: Approximation, step_checkpoint_every: int = 0) -> DenoisingStage:
    """The denoising stage of the model's last variant, which takes an image if there are several variants."""
    (stage,) = load_stages(
        model,
        model.service("denoising"),
        Runtime(
            device=CPU, dtype=torch.float32, step_checkpoint_every=step_checkpoint_every, approximation=approximation
        ),
        variant=model.variants[-1].name,
    )
    assert isinstance(stage, DenoisingStage)
    return stage


def latents_of(stage: DenoisingStage, x: DenoisingInput, call: Call | None = None) -> Tensor:
    """Run the loop; returns the latents of all parts as one vector."""
    parts = stage.run(x, call or Call("test")).denoised_latents.parts.values()
    return torch.cat([part.latents.flatten() for part in parts])


def test_float8_is_applied_to_all_large_layers_and_no_others(case: Case) -> None:
    """Each large weight of the blocks is stored once, as float8; the result is close to the exact result."""
    model, x, layers = case
    stage = stage_of(model, FLOAT8_LINEARS)
    transformer: Any = stage._predictor.transformers["transformer"]
    quantized = {name for name, value in transformer.named_parameters() if value.dtype == FLOAT8}
    matrices = (name for name, value in transformer.named_parameters() if value.ndim == 2)
    blocks = [name.split(".") for name in matrices if any(part in name for part in ("blocks.", "layers.", "_refiner."))]
    # The layer of per-head gates is small.
    assert quantized == {".".join(path) for path in blocks if path[2] in layers and "to_gate_logits" not in path}
    for module in transformer.modules():
        if isinstance(module, JoinsWeights):
            joined = [value for value in vars(module).values() if isinstance(value, JoinedLinear)]
            assert joined
            assert all(each.weight.values.dtype == FLOAT8 for each in joined)
    error = relative_error(latents_of(stage, x), latents_of(stage_of(model, EXACT), x))
    assert 1e-4 < error < 0.1


def with_step_cache(model: ServedModel, threshold: float) -> DenoisingStage:
    return stage_of(model, Approximation(step_cache_threshold=threshold), step_checkpoint_every=1)


def test_a_step_cache_without_reused_steps_changes_no_bit(case: Case) -> None:
    """Probes run, but no step differs from the previous step by less than the threshold."""
    model, x, _ = case
    before = reused_count()
    assert torch.equal(latents_of(with_step_cache(model, 1e-9), x), latents_of(stage_of(model, EXACT), x))
    assert reused_count() == before


def test_a_step_cache_reuses_steps_with_small_changes(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """A second request gives the same bytes, because it does not reuse residuals of the first request."""
    model, x, _ = case
    stage, before = with_step_cache(model, 1e9), reused_count()
    with caplog.at_level(logging.INFO, "models.stages.denoising"):
        first = latents_of(stage, x)
    has_negative = bool(x.text_conditioning.negative_prompt_embeds)
    branches = len(stage._config.branches_of(x.sampling, has_negative=has_negative))
    assert reused_count() - before == branches * (STEPS - 1)
    assert f"reused={branches * (STEPS - 1)} steps={STEPS}" in caplog.text
    error = relative_error(first, latents_of(stage_of(model, EXACT), x))
    # Only LTX-2 has two latent parts. Its guidance on clean latents, with three branches, amplifies errors more.
    assert 1e-5 < error < (0.5 if len(x.initial_latents.parts) == 1 else 1.0)
    assert torch.equal(latents_of(stage, x), first)


def test_a_reused_step_adds_the_cached_residual(case: Case) -> None:
    """If the same step is repeated, the cached residual gives the same prediction."""
    model, x, _ = case
    stage = with_step_cache(model, 1e-9)
    with torch.inference_mode(), stage._memory.leases() as lease:
        predictor = stage._predictor
        request = predictor.request(x)
        state = LoopState.of(x, stage._config.part_keywords, stage._new_solver)
        branches = predictor.branches(request, state.latents, request.steps, lease, stage._caching)
        given = predictor.model_input(state.latents, request.conditions)
        branch = branches._branches["positive", "transformer"]
        computed, reused = branch.predict(given, 0), branch.predict(given, 0)
    assert branch.reused == 1
    assert relative_error(reused["hidden_states"], computed["hidden_states"]) <= 1e-5


def test_a_loop_with_a_step_cache_neither_sends_nor_accepts_step_checkpoints(case: Case) -> None:
    model, x, _ = case
    states: list[StepCheckpoint] = []
    latents_of(
        stage_of(model, EXACT, step_checkpoint_every=1), x, Call("test", on_item=step_checkpoints_to(states.append))
    )
    assert len(states) == STEPS - 1
    call = Call("test", on_item=step_checkpoints_to(lambda _: pytest.fail("a step checkpoint was sent")))
    latents_of(with_step_cache(model, 1e-9), x, call)
    with pytest.raises(InvalidInput, match="a loop with a step cache has no step checkpoints") as caught:
        latents_of(with_step_cache(model, 1e-9), replace(x, resume_from=states[0]))
    assert caught.value.field == "resume_from"


def test_a_loop_with_a_step_cache_is_not_handed_over(case: Case) -> None:
    model, x, _ = case
    call = Call("test")
    call.hand_over.set()
    whole = latents_of(with_step_cache(model, 1e-9), x)
    assert torch.equal(latents_of(with_step_cache(model, 1e-9), x, call), whole)


def reused_count() -> float:
    """Count of reused predictions of all requests in this process."""
    return REGISTRY.get_sample_value("fleet_steps_reused_total") or 0.0


def test_a_family_without_float8_layers_is_refused(tmp_path: Path) -> None:
    with toy_family(tmp_path / "plugins") as plugins:
        model = open_model(str(build_toy_checkpoint(tmp_path / "toy")), load_registry([plugins]))
        spec = model.service("denoising")
        with pytest.raises(InvalidInput, match=r"float8.* is not supported by ToyPipeline, which has no transformer"):
            load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32, approximation=FLOAT8_LINEARS))


def test_settings_select_the_approximation() -> None:
    assert DenoisingSettings(model="emoji", redis="unix:///x").approximation == EXACT
    given = DenoisingSettings(model="emoji", redis="unix:///x", linear_dtype="float8", step_cache_threshold=0.1)
    assert given.approximation == Approximation("float8", 0.1)


def test_a_negative_threshold_is_refused_before_the_service_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(denoising, "serve", lambda *_, **__: pytest.fail("the service started"))
    flags = ["--model", "emoji", "--redis", "unix:///x", "--device", "cpu", "--step-cache-threshold", "-0.1"]
    assert denoising.main(flags) == 2
    assert "step_cache_threshold: -0.1 is not at least 0" in capsys.readouterr().err
