"""An unsupported scheduler is refused when the model is opened or loaded, not at the first request."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.artifacts import Canvas, Sampling
from common.errors import CheckpointError, InvalidInput
from common.stage import Call
from configs.pipeline_configs.wan import WanPipelineConfig
from configs.sample.wan import WanSamplingParams
from models.catalog import ServedModel, open_model
from models.contracts import TimestepPreparationInput
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.schedulers.solver import _SOLVERS
from models.schedulers.support import SCHEDULERS
from models.schedulers.trial import try_schedules
from models.stages.timestep_preparation import TimestepPreparationStage
from models.validation import InputValidationStage
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_wan import build_tiny_wan

# NumPy warns when UniPCMultistepScheduler computes noise levels from alphas_cumprod, instead of flow sigmas.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FILE = "scheduler/scheduler_config.json"
BUILDERS: dict[str, Callable[[Path], Path]] = {
    "flux": build_tiny_flux,
    "qwen": build_tiny_qwen_image,
    "wan": build_tiny_wan,
}


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that copies a family's checkpoint and changes scheduler entries; each family is built once."""
    built: dict[str, Path] = {}

    def edit(family: str, **entries: object) -> Path:
        if family not in built:
            built[family] = BUILDERS[family](tmp_path_factory.mktemp(family))
        copy = tmp_path_factory.mktemp("edited") / family
        shutil.copytree(built[family], copy)
        file = copy / FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return copy

    return edit


def opened(path: Path) -> ServedModel:
    return open_model(str(path), load_registry())


def load(model: ServedModel, service: str) -> list[Any]:
    return load_stages(model, model.service(service), Runtime(device=torch.device("cpu"), dtype=torch.float32))


NOISE_PREDICTION: dict[str, object] = {"prediction_type": "epsilon", "use_flow_sigmas": False}
CANNOT_RUN: dict[str, tuple[str, dict[str, object], str]] = {
    "dynamic shifting without a size": ("wan", {"use_dynamic_shifting": True}, "cannot run 50 steps .*`mu` must be"),
    "noise prediction with flow sigmas": (
        "wan",
        {"predict_x0": False},
        "cannot run 50 steps .*flow_prediction must be one",
    ),
    "noise prediction down to 0": (
        "wan",
        {**NOISE_PREDICTION, "predict_x0": False},
        "the final latents are not finite",
    ),
    "exponential noise levels": ("wan", {"use_exponential_sigmas": True}, "the final latents are not finite"),
    "unknown spacing": ("wan", {"timestep_spacing": "x"}, "cannot run 50 steps .*x is not supported"),
    "no shift": ("wan", {"flow_shift": None}, "cannot run 50 steps .*NoneType"),
    "unknown shift": ("flux", {"time_shift_type": "x"}, "time_shift_type` must either be"),
    "no training steps": ("flux", {"num_train_timesteps": 0}, "cannot be loaded: index -1 is out of bounds"),
}


@pytest.mark.parametrize("service", ["latent_preparation", "denoising"])
@pytest.mark.parametrize("case", CANNOT_RUN)
def test_a_scheduler_config_that_cannot_run_is_refused(edited: Callable[..., Path], case: str, service: str) -> None:
    family, entries, message = CANNOT_RUN[case]
    model = opened(edited(family, **entries))
    with pytest.raises(CheckpointError, match=message) as refused:
        load(model, service)
    assert "scheduler" in refused.value.message


@pytest.mark.parametrize(
    ("family", "module"),
    [("flux", "scheduling_flow_match_euler_discrete"), ("wan", "scheduling_unipc_multistep")],
)
def test_beta_sigmas_need_scipy(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, module: str
) -> None:
    monkeypatch.setattr(f"diffusers.schedulers.{module}.is_scipy_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"scheduler: .*install scipy"):
        load(opened(edited(family, use_beta_sigmas=True)), "latent_preparation")


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("wan", NOISE_PREDICTION),
        ("wan", {**NOISE_PREDICTION, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
        ("wan", {"solver_order": 3}),
        ("wan", {"final_sigmas_type": "sigma_min"}),
        ("flux", {"use_karras_sigmas": True}),
        ("flux", {"use_dynamic_shifting": False}),
        ("qwen", {"shift_terminal": None}),
    ],
)
def test_other_scheduler_configs_that_run_are_accepted(
    edited: Callable[..., Path], family: str, entries: dict[str, object]
) -> None:
    model = opened(edited(family, **entries))
    for service in ("latent_preparation", "denoising"):
        assert load(model, service)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"stochastic_sampling": True}, "stochastic_sampling: true is not supported"),
        ({"solver_p": {}}, "solver_p is not supported"),
    ],
)
def test_invalid_entries_are_refused_when_the_model_is_opened(
    edited: Callable[..., Path], entries: dict[str, object], message: str
) -> None:
    path = edited("flux", **entries)
    with pytest.raises(CheckpointError, match=message):
        opened(path)


def test_the_refusal_of_a_scheduler_lists_the_supported_schedulers(edited: Callable[..., Path]) -> None:
    path = edited("flux")
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    with pytest.raises(CheckpointError) as refused:
        opened(path)
    assert refused.value.message == (
        "scheduler: DDIMScheduler is not supported; supported: FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler"
    )


def test_every_supported_scheduler_has_a_solver() -> None:
    assert set(SCHEDULERS) == set(_SOLVERS)


@pytest.mark.parametrize("family", BUILDERS)
def test_one_step_is_refused_with_shift_terminal(edited: Callable[..., Path], family: str) -> None:
    model = opened(edited(family, shift_terminal=0.1))
    load(model, "denoising")
    with pytest.raises(InvalidInput, match="is not at least 2") as refused:
        InputValidationStage(model).run({"prompt": "", "num_inference_steps": 1})
    assert refused.value.field == "num_inference_steps"
    InputValidationStage(model).run({"prompt": "", "num_inference_steps": 2})


def test_noise_levels_that_are_not_finite_are_refused_at_the_request(
    edited: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The parameter checks do not detect this case. The model is served because other requests run."""
    model = opened(edited("wan"))
    (stage,) = load(model, "latent_preparation")[1:]
    config = WanPipelineConfig.from_checkpoint(model.checkpoint)
    scheduler = vars(stage)["_scheduler"]
    scheduler.register_to_config(shift_terminal=0.1)
    sampling = Sampling(seed=0, num_inference_steps=1, num_outputs_per_prompt=1)
    x = TimestepPreparationInput(canvas=Canvas(height=16, width=16, num_frames=1), sampling=sampling)
    with pytest.raises(InvalidInput, match="non-finite noise levels") as refused:
        TimestepPreparationStage(config, Runtime(), {"scheduler": scheduler}).run(x, Call("test"))
    assert refused.value.field == "num_inference_steps"
    with caplog.at_level(logging.WARNING):
        try_schedules(model.checkpoint, WanSamplingParams, config, "scheduler", scheduler)
    assert "requests for 1 step will be rejected" in caplog.text


def test_schedules_of_50_steps_2_steps_and_1_step_are_tried(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    run = TimestepPreparationStage.run

    def recorded(stage: TimestepPreparationStage, x: TimestepPreparationInput, call: Call) -> Any:
        tried.append(x.sampling.num_inference_steps)
        return run(stage, x, call)

    monkeypatch.setattr(TimestepPreparationStage, "run", recorded)
    load(opened(edited("wan")), "latent_preparation")
    assert tried == [50, 2, 1]
