"""The denoising loop on a tiny model: two latent parts, two experts, four branches, hooks and noise."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import Latents, StepCheckpoint
from common.errors import Cancelled, HandedOver, InvalidInput, ResourceExhausted
from common.stage import Call
from configs.pipeline_configs.base import Parts, Step
from fake_graphs import FakeCapture
from loop_family import SHAPES, STEPS, LoopConfig, LoopTransformer, loop_input, loop_stage
from models.contracts import DenoisingInput
from models.dits.base import Predictions
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.stages.step_memory import StepMemoryPool
from step_checkpoints import step_checkpoints_to


def run(stage: DenoisingStage, x: DenoisingInput, call: Call | None = None) -> dict[str, Tensor]:
    return tensors(stage.run(x, call or Call("test")).denoised_latents)


def tensors(latents: Latents) -> dict[str, Tensor]:
    return {part: each.latents for part, each in latents.parts.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[part], other[part]) for part in one)


def checkpoints_of(x: DenoisingInput) -> tuple[dict[str, Tensor], list[StepCheckpoint]]:
    """Run a whole loop; returns its result and its step checkpoints."""
    states: list[StepCheckpoint] = []
    stage, _ = loop_stage(Runtime(step_checkpoint_every=1))
    return run(stage, x, Call("test", on_item=step_checkpoints_to(states.append))), states


def with_graphs(*, remembers: bool = False, max_bytes: int = 1 << 20) -> tuple[DenoisingStage, FakeCapture]:
    """A stage that replays its steps from fake CUDA graphs."""
    stage, _ = loop_stage(remembers=remembers)
    capture = FakeCapture()
    stage._memory = StepMemoryPool(max_bytes, capture)
    return stage, capture


def test_hooks_and_branches_run_in_each_step() -> None:
    stage, config = loop_stage()
    run(stage, loop_input())
    expected: list[str] = []
    for step in range(STEPS):
        guided = [f"guide {step} positive negative perturbed isolated"] if step % 2 == 0 else []
        expected += [f"before {step}", *guided, f"after {step}"]
    assert config.calls == [*expected, "after loop"]


def test_the_model_reads_contiguous_latents_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed loop starts with contiguous latents, and kernels for other strides may round differently."""
    predict, read = LoopTransformer.predict, []

    def recorded(self: LoopTransformer, video: Tensor, sound: Tensor, *args: Any, **keywords: Any) -> Predictions:
        read.append(video.is_contiguous() and sound.is_contiguous())
        return predict(self, video, sound, *args, **keywords)

    def column_major(self: LoopConfig, step: Step, latents: Parts, conditions: Parts) -> Parts:
        del self, step, conditions
        return {part: each.mT.contiguous().mT for part, each in latents.items()}

    monkeypatch.setattr(LoopTransformer, "predict", recorded)
    monkeypatch.setattr(LoopConfig, "after_step", column_major)
    run(loop_stage()[0], loop_input())
    assert read
    assert all(read)


def test_every_latent_part_and_expert_is_used() -> None:
    stage, _ = loop_stage()
    result = run(stage, loop_input())
    assert {part: tuple(each.shape) for part, each in result.items()} == dict(SHAPES)
    calls = {role: each.eager_calls for role, each in stage._predictor.transformers.items()}
    # Noise levels 1, 0.8 and 0.6 are above 0.5: 4 + 1 + 4 predictions; 0.4 and 0.2 are below: 1 + 4.
    assert calls == {"transformer": 9, "transformer_2": 5}


def test_a_stochastic_loop_resumes_to_the_same_bytes_at_every_step() -> None:
    x = loop_input()
    whole, states = checkpoints_of(x)
    assert [state.step for state in states] == list(range(1, STEPS))
    for state in states:
        assert state.generator is not None
        assert set(state.solver) == {"video.last", "audio.last"}
        stage, _ = loop_stage()
        assert equal(run(stage, replace(x, resume_from=state)), whole), f"after step {state.step}"


def test_a_resume_from_the_last_step_checkpoint_runs_the_last_step_and_after_loop() -> None:
    """The last step checkpoint precedes the last step, so it never contains the changes of after_loop()."""
    x = loop_input()
    _, states = checkpoints_of(x)
    stage, config = loop_stage()
    run(stage, replace(x, resume_from=states[-1]))
    assert config.calls[0] == f"before {STEPS - 1}"
    assert config.calls[-1] == "after loop"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"generator": None}, "resume_from.generator"),
        ({"solver": {"depth.last": torch.zeros(1)}}, "resume_from.solver"),
        ({"latents": Latents(parts={})}, "resume_from.latents"),
        ({"step": STEPS + 1}, "resume_from.step"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_checkpoint_of_another_loop_is_refused(change: dict[str, object], field: str) -> None:
    x = loop_input()
    _, states = checkpoints_of(x)
    stage, _ = loop_stage()
    with pytest.raises(InvalidInput) as refused:
        run(stage, replace(x, resume_from=replace(states[0], **change)))  # type: ignore[arg-type]
    assert refused.value.field == field


def test_graphs_give_the_same_bytes_as_eager_steps() -> None:
    """Experts and branches have equal shapes, but different graphs. Replaying a wrong graph changes the bytes."""
    stage, capture = with_graphs()
    for seed in range(3):
        x = loop_input(seed)
        eager, _ = loop_stage()
        assert equal(run(stage, x), run(eager, x)), f"request {seed}"
    # Two experts with four branches; "negative" and "isolated" have equal keys, but are leased at the same time.
    assert len(capture.graphs) == 8
    assert capture.replays > 3 * len(capture.graphs)


def test_step_memory_is_reset_for_every_request() -> None:
    """Graphs update step memory in place, at a fixed address; the next request starts from zeros."""
    eager, _ = loop_stage(remembers=True)
    stage, capture = with_graphs(remembers=True)
    x = loop_input()
    first = run(stage, x)
    assert equal(first, run(eager, x))
    for _ in range(2):
        assert equal(run(stage, x), first)
    assert len(capture.graphs) == 8


def test_idle_step_memory_is_freed_for_other_shapes() -> None:
    """The pool is bounded in bytes: step memory for one output evicts idle step memory for two outputs."""
    measured, _ = with_graphs()
    run(measured, loop_input())
    stage, capture = with_graphs(max_bytes=measured._memory.byte_size)
    graphs: list[int] = []
    for x in (loop_input(), loop_input(1), shorter(loop_input()), loop_input()):
        run(stage, x)
        graphs.append(len(capture.graphs))
        assert stage._memory.byte_size <= measured._memory.byte_size
    # With the second expert, one branch runs two steps of the first request, and the other branches one step.
    assert graphs[:3] == [5, 8, 13]
    assert graphs[3] > 13, "freed graphs are captured again"


def shorter(x: DenoisingInput) -> DenoisingInput:
    """The request with one output."""
    parts = {part: replace(each, latents=each.latents[:1]) for part, each in x.initial_latents.parts.items()}
    sampling = replace(x.sampling, num_outputs_per_prompt=1)
    return replace(x, initial_latents=Latents(parts=parts), sampling=sampling)


def test_a_request_that_exceeds_step_memory_is_refused_before_the_loop_starts() -> None:
    stage, capture = with_graphs(max_bytes=100)
    steps: list[int] = []
    with pytest.raises(ResourceExhausted, match=r"needs \d+ bytes, but \d+ of 100 are free") as refused:
        run(stage, loop_input(), Call("test", on_progress=lambda step, _: steps.append(step)))
    assert refused.value.field == ""
    assert not steps
    assert not capture.graphs
    assert not stage._memory._leased, "memory leased before the failure is returned"


@pytest.mark.parametrize("failing_call", [1, 5, 8, 12])
def test_a_loop_that_fails_returns_its_step_memory(monkeypatch: pytest.MonkeyPatch, failing_call: int) -> None:
    """Covers failures in an eager step of each expert, and in two captures."""
    stage, _ = with_graphs(remembers=True)
    eager, _ = loop_stage(remembers=True)
    x, calls = loop_input(), 0
    predict = LoopTransformer.predict

    def failing(transformer: LoopTransformer, *args: Any, **inputs: Any) -> Predictions:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise ArithmeticError
        return predict(transformer, *args, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(LoopTransformer, "predict", failing)
        with pytest.raises(ArithmeticError) as failed:
            run(stage, x)
    assert calls == failing_call
    assert failed.tb is not None, (
        "the traceback keeps the loop's frames alive, so that no generator exit returns the memory"
    )
    assert not stage._memory._leased
    idle = set(stage._memory._idle.values())
    assert len(idle) == 8
    expected = run(eager, x)
    for _ in range(2):
        assert equal(run(stage, x), expected)
    assert set(stage._memory._idle.values()) == idle, "later requests lease the memory that the failed request returned"


def test_a_cancelled_loop_returns_its_step_memory() -> None:
    stage, _ = with_graphs(remembers=True)
    eager, _ = loop_stage(remembers=True)
    x, cancelled = loop_input(), threading.Event()
    with pytest.raises(Cancelled):
        run(stage, x, Call("test", on_progress=lambda *_: cancelled.set(), cancelled=cancelled))
    assert not stage._memory._leased
    assert equal(run(stage, x), run(eager, x))


def test_stages_of_one_runtime_share_one_step_memory_pool() -> None:
    """Both stages count towards one bound, and neither uses the other stage's graphs."""
    runtime = Runtime()
    (one, _), (other, _) = loop_stage(runtime), loop_stage(runtime)
    alone, _ = loop_stage()
    assert one._memory is other._memory is runtime.step_memory
    assert alone._memory is not runtime.step_memory
    x = loop_input()
    expected = run(alone, x)
    assert equal(run(one, x), expected)
    size = runtime.step_memory.byte_size
    for _ in range(2):
        assert equal(run(other, x), expected)
        assert runtime.step_memory.byte_size == 2 * size


def test_a_loop_that_is_handed_over_sends_a_step_checkpoint_at_the_step_boundary() -> None:
    """The resumed loop repeats no step and gives the same bytes. Periodic step checkpoints are disabled."""
    x = loop_input()
    whole, _ = checkpoints_of(x)
    stage, _ = loop_stage(Runtime(step_checkpoint_every=0, step_checkpoint_seconds=0.0))
    for handed_over_at in range(1, STEPS):
        states: list[StepCheckpoint] = []
        done: list[int] = []
        call = Call("test", on_item=step_checkpoints_to(states.append))

        def progress(step: int, _: int, call: Call = call, done: list[int] = done, at: int = handed_over_at) -> None:
            done.append(step)
            if step == at:
                call.hand_over.set()

        with pytest.raises(HandedOver, match=f"after {handed_over_at} steps"):
            run(stage, x, replace(call, on_progress=progress))
        (state,) = states
        assert state.step == handed_over_at
        rest = Call("test", on_progress=lambda step, _, done=done: done.append(step))  # type: ignore[misc]
        assert equal(run(stage, replace(x, resume_from=state), rest), whole)
        assert done == list(range(1, STEPS + 1))


def test_a_loop_that_is_handed_over_before_it_runs_a_step_sends_no_step_checkpoint() -> None:
    x = loop_input()
    _, states = checkpoints_of(x)
    stage, _ = loop_stage()
    for start in (None, states[1]):
        call = Call(
            "test", on_item=step_checkpoints_to(lambda _: pytest.fail("the caller has this step checkpoint already"))
        )
        call.hand_over.set()
        with pytest.raises(HandedOver):
            run(stage, replace(x, resume_from=start), call)
