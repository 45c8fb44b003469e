"""Trial run of a scheduler at load time: rejects configurations that the scheduler cannot run."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import torch

from common.artifacts import Canvas, ParamValue, Sampling, Schedule
from common.errors import CheckpointError, InvalidInput
from common.logs import get_logger
from common.stage import Call
from models.composition import SCHEDULER
from models.contracts import TimestepPreparationInput
from models.runtime import Runtime
from models.schedulers.solver import solver_class
from models.schedulers.support import SCHEDULERS
from models.stages.timestep_preparation import TimestepPreparationStage

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from configs.pipeline_configs.base import PreparationConfig
    from configs.sample.base import SamplingParams

# Exceptions that Diffusers' schedulers raise for unsupported configurations and numbers of steps.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError)
_SMALL_STEP_COUNTS = (2, 1)
_LATENTS_SHAPE = (1, 1, 1, 1)
_MAX_ERROR_CHARS = 400

_log = get_logger(__name__)


def try_schedules(
    checkpoint: Checkpoint,
    params_class: type[SamplingParams],
    config: PreparationConfig,
    name: str,
    scheduler: Any,
) -> None:
    """Run the schedules of the default number of steps, of 2 steps and of 1 step, on small latents.

    `name` is the name of the scheduler in model_index.json. Numbers of steps that `params_class` rejects are skipped. A
    1-step schedule with non-finite noise levels is logged as a warning, as requests for 1 step are then rejected.
    Raises CheckpointError for all other failures.
    """
    requests: list[dict[str, ParamValue]] = [{"num_inference_steps": steps} for steps in _SMALL_STEP_COUNTS]
    for given in ({}, *requests):
        try:
            params, _ = params_class.build({"prompt": "", "seed": 0, **given}, checkpoint)
        except InvalidInput:
            continue
        artifacts = params.artifacts()
        canvas, sampling = artifacts["canvas"], artifacts["sampling"]
        assert isinstance(canvas, Canvas), "SamplingParams.artifacts() has one artifact per slot"
        assert isinstance(sampling, Sampling), "SamplingParams.artifacts() has one artifact per slot"
        try:
            _run(config, scheduler, canvas, sampling)
        except InvalidInput as error:
            if given.get("num_inference_steps") != 1:
                raise _refusal(checkpoint, name, scheduler, sampling, error) from error
            _log.warning("requests for 1 step will be rejected", reason=error.message)
        except (*_FAILURES, ValueError) as error:
            raise _refusal(checkpoint, name, scheduler, sampling, error) from error


def _run(config: PreparationConfig, scheduler: Any, canvas: Canvas, sampling: Sampling) -> None:
    stage = TimestepPreparationStage(config, Runtime(), {SCHEDULER: scheduler})
    prepared = stage.run(TimestepPreparationInput(canvas=canvas, sampling=sampling), Call("schedule-trial"))
    if type(scheduler).__name__ in SCHEDULERS:
        _take_steps(scheduler, prepared.schedule)


@torch.inference_mode()
def _take_steps(scheduler: Any, schedule: Schedule) -> None:
    solver = solver_class(scheduler)(scheduler, schedule)
    latents = torch.ones(_LATENTS_SHAPE)
    for timestep in schedule.timesteps:
        latents = solver.step(torch.zeros_like(latents), timestep, latents)
    if not bool(torch.isfinite(latents).all()):
        raise ArithmeticError("the final latents are not finite")


def _refusal(
    checkpoint: Checkpoint, name: str, scheduler: Any, sampling: Sampling, error: Exception
) -> CheckpointError:
    sentence = error.message if isinstance(error, InvalidInput) else str(error) or type(error).__name__
    file = checkpoint.path / name / "scheduler_config.json"
    return CheckpointError(
        f"{file}: {type(scheduler).__name__} cannot run {sampling.num_inference_steps} steps with this configuration: "
        f"{textwrap.shorten(sentence, _MAX_ERROR_CHARS, placeholder=' ...')}"
    )
