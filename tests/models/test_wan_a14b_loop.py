"""The denoising loop of Wan 2.2 A14B: byte-equal resume, cancellation, and swapped experts."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from prometheus_client import REGISTRY
from torch import Tensor

from common.artifacts import StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled, InvalidInput
from common.stage import Call
from common.tensors import TORCH
from configs.approximation import Approximation
from fake_graphs import FakeCapture
from models.catalog import ServedModel, open_model
from models.contracts import DenoisingInput
from models.experts import SwappedExpert, on_device
from models.loader import load_stages
from models.registry import load_registry, resolve
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.stages.step_memory import StepMemoryPool
from models.warm_up import STEPS as WARM_UP_STEPS
from models.warm_up import WarmUp
from parallel_cases import FAMILIES, STEPS, draw_input
from services.denoising.settings import DenoisingSettings
from step_checkpoints import step_checkpoints_to
from tiny_wan import build_tiny_wan_a14b


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(str(build_tiny_wan_a14b(tmp_path_factory.mktemp("wan") / "a14b")), load_registry())


@pytest.fixture(scope="module")
def x(model: ServedModel) -> DenoisingInput:
    config = resolve(model.variants[0].pipeline_config).from_checkpoint(model.checkpoint)
    return draw_input(model.checkpoint, config, FAMILIES["wan-a14b"])


def open_stage(model: ServedModel, runtime: Runtime) -> DenoisingStage:
    (stage,) = load_stages(model, model.service("denoising"), runtime)
    assert isinstance(stage, DenoisingStage)
    return stage


@pytest.fixture(scope="module")
def stage(model: ServedModel) -> DenoisingStage:
    """A stage with both experts on the device."""
    return open_stage(model, Runtime(step_checkpoint_every=1))


@pytest.fixture(scope="module")
def swapping(model: ServedModel) -> DenoisingStage:
    """A stage with one expert at a time on the device."""
    return open_stage(model, Runtime(step_checkpoint_every=1, swap_experts=True))


def run(stage: DenoisingStage, x: DenoisingInput, states: list[StepCheckpoint] | None = None) -> Tensor:
    call = Call("test", on_item=step_checkpoints_to(([] if states is None else states).append))
    return stage.run(x, call).denoised_latents.parts["video"].latents


def swap_count() -> float:
    """Count of expert swaps in this process."""
    return REGISTRY.get_sample_value("fleet_expert_swap_seconds_count") or 0.0


def test_a_loop_resumes_after_every_step_to_the_same_bytes(
    stage: DenoisingStage, swapping: DenoisingStage, x: DenoisingInput
) -> None:
    """Covers resume after the boundary, where only transformer_2 runs, and a worker that swaps experts."""
    states: list[StepCheckpoint] = []
    whole = run(stage, x, states)
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        for resuming in (stage, swapping):
            assert torch.equal(run(resuming, replace(x, resume_from=sent)), whole), f"after step {state.step}"


def test_swapped_experts_give_the_same_bytes(
    stage: DenoisingStage, swapping: DenoisingStage, x: DenoisingInput
) -> None:
    """A request swaps twice, as the previous request left transformer_2 on the device."""
    expected = run(stage, x)
    run(swapping, x)
    before = swap_count()
    for num_requests in (1, 2):
        assert torch.equal(run(swapping, x), expected)
        assert swap_count() == before + 2 * num_requests
    assert swap_count() > before
    before = swap_count()
    run(stage, x)
    assert swap_count() == before


def test_each_swapped_expert_has_its_own_graphs(model: ServedModel, stage: DenoisingStage, x: DenoisingInput) -> None:
    """Swapped experts share one module. Graphs read the module's weights by address."""
    swapping, capture = open_stage(model, Runtime(swap_experts=True)), FakeCapture()
    swapping._memory = StepMemoryPool(1 << 30, capture)
    expected = run(stage, x)
    for _ in range(3):
        assert torch.equal(run(swapping, x), expected)
    assert [len(memory._graphs) for memory in swapping._memory._idle.values()] == [1] * 4, (
        "one graph for each of two branches of two experts"
    )
    assert len(capture.graphs) == 4


def test_swap_experts_is_refused_by_a_model_with_one_transformer() -> None:
    emoji = open_model("emoji", load_registry())
    with pytest.raises(InvalidInput, match="swap_experts: True is not supported by a model with one transformer"):
        load_stages(emoji, emoji.service("denoising"), Runtime(swap_experts=True))


def test_swap_experts_is_a_setting_of_the_denoiser() -> None:
    for swap in (False, True):
        settings = DenoisingSettings(redis="unix:///x", swap_experts=swap)
        assert settings.runtime(torch.device("cpu"), torch.float32).swap_experts is swap


def test_swapped_experts_share_one_module(swapping: DenoisingStage) -> None:
    experts = [swapping._predictor.transformers[role] for role in ("transformer", "transformer_2")]
    assert all(isinstance(expert, SwappedExpert) for expert in experts)
    weights = [[each.clone() for each in on_device(expert).state_dict().values()] for expert in experts]
    assert on_device(experts[0]) is on_device(experts[1])
    assert any(not torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_float8_weights_are_swapped_with_their_scales(model: ServedModel, x: DenoisingInput) -> None:
    approximation = Approximation(linear_dtype="float8")
    both, swapping = (
        open_stage(model, Runtime(approximation=approximation, swap_experts=swap)) for swap in (False, True)
    )
    assert torch.equal(run(swapping, x), run(both, x))


@pytest.mark.parametrize("step", [0, 2], ids=["transformer", "transformer_2"])
def test_cancellation_ends_the_loop_within_a_step(swapping: DenoisingStage, x: DenoisingInput, step: int) -> None:
    """Covers cancellation in each expert. The next request is not affected."""
    expected, reported, cancelled = run(swapping, x), [], threading.Event()

    def on_progress(*_: object) -> None:
        reported.append(True)
        if len(reported) > step:
            cancelled.set()

    with pytest.raises(Cancelled):
        swapping.run(x, Call("test", on_progress=on_progress, cancelled=cancelled))
    assert len(reported) == step + 1
    assert torch.equal(run(swapping, x), expected)


def test_a_warm_up_runs_both_experts(model: ServedModel, swapping: DenoisingStage, x: DenoisingInput) -> None:
    """Each expert runs as many steps as the warm-up of a model with one transformer."""
    run(swapping, x)
    warm_up = WarmUp.parse(model, ("32x48x5",))
    (given,) = warm_up.inputs(torch.float32)
    before = swap_count()
    swapping.run(DenoisingInput(**given), Call("warm-up"))
    assert swap_count() == before + 2
    steps = given["schedule"].timesteps.tolist()
    roles = ["transformer" if timestep >= 875 else "transformer_2" for timestep in steps]
    assert roles == ["transformer"] * WARM_UP_STEPS + ["transformer_2"] * WARM_UP_STEPS
