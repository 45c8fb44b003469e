"""Causal few-step Wan: parity with reference loops without a KV cache, and byte-equal resume."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import ParamValue, StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError, HandedOver, InvalidInput, ResourceExhausted
from common.stage import STEP_CHECKPOINTS
from common.tensors import TORCH
from configs.approximation import Approximation
from configs.models.dits.causal_wan import CausalWanTransformerConfig
from configs.pipeline_configs.wan_dmd import WanCausalDMDPipelineConfig
from configs.sample.wan_dmd import WanCausalDMDSamplingParams
from fake_graphs import FakeCapture
from local_fleet import NO_IMAGES, open_fleet, relative_error
from models.catalog import open_model
from models.dits.causal_wan import CausalWanTransformer3DModel
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.causal_dmd_denoising import BLOCKS
from models.stages.dmd_denoising import DmdDenoisingStage
from models.stages.predictor import Predictor
from models.stages.step_memory import StepMemoryPool
from models.warm_up import WarmUp
from tiny_wan import build_tiny_wan, build_tiny_wan_causal, edit_json
from wan_dmd_loops import SIZE, CausalLoop, RecordedCall, Request, reference_causal

STEPS = 4
"""Steps of a block."""
BLOCK = 2
"""Latent frames of a block."""
FRAMES = 21
"""Video frames of three blocks, which are six latent frames."""
TOTAL = 3 * STEPS
"""Steps of three blocks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("wan")


@pytest.fixture(scope="module")
def loop(folder: Path) -> CausalLoop:
    return CausalLoop(build_tiny_wan_causal(folder / "causal"))


@pytest.fixture(scope="module")
def windowed(folder: Path) -> CausalLoop:
    """A window of four frames, one of them a sink. Blocks of two frames wrap around in the other three frames."""
    return CausalLoop(build_tiny_wan_causal(folder / "windowed", local_attn_size=4, sink_size=1))


def test_several_blocks_match_a_loop_without_a_cache(loop: CausalLoop) -> None:
    x = loop.inputs(FRAMES, seed=5, outputs=2)
    got = loop.run(x)
    assert got.shape[2] == 3 * BLOCK
    assert relative_error(got, reference_causal(loop.path, Request.of(x), BLOCK)) <= 1e-5


def test_a_window_with_a_sink_matches_a_loop_without_a_cache(windowed: CausalLoop) -> None:
    """With five blocks, the window moves three times."""
    x = windowed.inputs(37)
    got = windowed.run(x)
    request = Request.of(x)
    assert relative_error(got, reference_causal(windowed.path, request, BLOCK, window=4, sink=1)) <= 1e-5
    assert relative_error(got, reference_causal(windowed.path, request, BLOCK)) > 1e-3, (
        "the window must change the result"
    )
    assert relative_error(got, reference_causal(windowed.path, request, BLOCK, window=4)) > 1e-3, (
        "the sink must change the result"
    )


def test_one_block_of_all_frames_equals_the_non_causal_loop(folder: Path) -> None:
    one = CausalLoop(build_tiny_wan_causal(folder / "one", num_frames_per_block=6))
    x = one.inputs(FRAMES, outputs=2)
    whole = DmdDenoisingStage(one.config, one.runtime, one.modules).run(x, RecordedCall().call()).denoised_latents
    assert relative_error(one.run(x), whole.parts["video"].latents) <= 1e-5


def test_blocks_depend_only_on_previous_blocks(loop: CausalLoop) -> None:
    x = loop.inputs(FRAMES)
    part = x.initial_latents.parts["video"]
    noise = part.latents.clone()
    noise[:, :, BLOCK : 2 * BLOCK] += 1
    changed = replace(x.initial_latents, parts={"video": replace(part, latents=noise)})
    one, other = loop.run(x), loop.run(replace(x, initial_latents=changed))
    assert torch.equal(one[:, :, :BLOCK], other[:, :, :BLOCK])
    assert relative_error(other[:, :, 2 * BLOCK :], one[:, :, 2 * BLOCK :]) > 1e-4


def test_a_block_is_emitted_after_its_last_step_checkpoint(loop: CausalLoop) -> None:
    recorded = RecordedCall()
    loop.run(loop.inputs(FRAMES), recorded)
    assert recorded.order == ([STEP_CHECKPOINTS] * STEPS + [BLOCKS]) * 3
    assert [state.step for state in recorded.states] == list(range(1, TOTAL + 1))
    assert recorded.steps == [(step, TOTAL) for step in range(1, TOTAL + 1)]


def test_a_step_checkpoint_is_sent_after_each_block_without_step_checkpoint_every(loop: CausalLoop) -> None:
    recorded = RecordedCall()
    CausalLoop(loop.path, Runtime()).run(loop.inputs(FRAMES), recorded)
    assert recorded.order == [STEP_CHECKPOINTS, BLOCKS] * 3
    assert [state.step for state in recorded.states] == [STEPS, 2 * STEPS, TOTAL]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """Number of predictions by (first frame, step); the step after the last step is the context pass."""
    counted: Counter[tuple[int, int]] = Counter()
    predict: Callable[..., Any] = Predictor.predict

    def counting(self: Predictor, request: Any, branches: Any, latents: Any, step: Any, flags: Any) -> Any:
        counted[dict(flags)["first_frame"], step.index] += 1
        return predict(self, request, branches, latents, step, flags)

    monkeypatch.setattr(Predictor, "predict", counting)
    return counted


@pytest.mark.parametrize("kind", ["loop", "windowed"])
def test_a_loop_resumes_after_every_step_to_the_same_bytes(
    request: pytest.FixtureRequest, predicted: Counter[tuple[int, int]], kind: str
) -> None:
    """Covers resume between blocks. The context pass of a finished block is repeated once, and its steps are not."""
    loop: CausalLoop = request.getfixturevalue(kind)
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    whole = loop.run(x, recorded)
    context_passes = {(block * BLOCK, STEPS): 1 for block in range(2)}
    assert predicted == {(block * BLOCK, step): 1 for block in range(3) for step in range(STEPS)} | context_passes
    for state in recorded.states:
        predicted.clear()
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        rest = RecordedCall()
        assert torch.equal(loop.run(replace(x, resume_from=sent), rest), whole), f"after step {state.step}"
        # A loop without remaining steps still reports its last step.
        assert rest.steps == [(step, TOTAL) for step in range(min(state.step + 1, TOTAL), TOTAL + 1)]
        finished = state.step // STEPS
        assert rest.order[:finished] == [BLOCKS] * finished, "finished blocks come first"
        remaining = {(step // STEPS * BLOCK, step % STEPS): 1 for step in range(state.step, TOTAL)}
        assert predicted == (remaining | context_passes if remaining else {}), f"after step {state.step}"


@pytest.mark.parametrize("last", [1, STEPS, STEPS + 1, 2 * STEPS])
def test_cancellation_ends_the_loop_within_a_step(loop: CausalLoop, last: int) -> None:
    recorded = RecordedCall()
    call = recorded.call(lambda step, _: call.cancelled.set() if step == last else None)
    with pytest.raises(Cancelled):
        loop.stage().run(loop.inputs(FRAMES), call)
    assert len(recorded.steps) == last
    assert len(recorded.blocks) == last // STEPS


def test_cancellation_ends_a_resumed_loop_before_its_context_passes(
    loop: CausalLoop, predicted: Counter[tuple[int, int]]
) -> None:
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    loop.run(x, recorded)
    predicted.clear()
    call = RecordedCall().call()
    call.cancelled.set()
    with pytest.raises(Cancelled):
        loop.stage().run(replace(x, resume_from=recorded.states[2 * STEPS]), call)
    assert not predicted


def test_a_hand_over_ends_a_resumed_loop_before_its_context_passes(
    loop: CausalLoop, predicted: Counter[tuple[int, int]]
) -> None:
    """No step checkpoint is sent: the receiver has the step checkpoint from which the loop resumed."""
    x, recorded, resumed = loop.inputs(FRAMES), RecordedCall(), RecordedCall()
    loop.run(x, recorded)
    predicted.clear()
    call = resumed.call()
    call.hand_over.set()
    with pytest.raises(HandedOver, match=f"after {2 * STEPS + 1} steps"):
        loop.stage().run(replace(x, resume_from=recorded.states[2 * STEPS]), call)
    assert not predicted
    assert not resumed.states


@pytest.mark.parametrize("at", [1, STEPS, STEPS + 2])
def test_a_loop_is_handed_over_at_a_step_boundary(loop: CausalLoop, at: int) -> None:
    x, recorded = loop.inputs(FRAMES), RecordedCall()
    whole = loop.run(x)
    call = recorded.call(lambda step, _: call.hand_over.set() if step == at else None)
    with pytest.raises(HandedOver, match=f"after {at} steps"):
        loop.stage().run(x, call)
    assert recorded.states[-1].step == at
    assert torch.equal(loop.run(replace(x, resume_from=recorded.states[-1])), whole)


def with_graphs(loop: CausalLoop, max_bytes: int = 1 << 24) -> tuple[Any, FakeCapture]:
    stage, capture = loop.stage(), FakeCapture()
    stage._memory = StepMemoryPool(max_bytes, capture)
    return stage, capture


def video_of(stage: Any, x: Any) -> Tensor:
    recorded = RecordedCall()
    stage.run(x, recorded.call())
    return recorded.video


def test_blocks_with_different_numbers_of_earlier_frames_have_different_graphs(loop: CausalLoop) -> None:
    """Blocks have equal shapes and share one KV cache, but graphs depend on the number of earlier frames."""
    stage, capture = with_graphs(loop)
    for seed in (1, 2):
        x = loop.inputs(FRAMES, seed)
        assert torch.equal(video_of(stage, x), loop.run(x)), f"request {seed}"
    # The second request leases the KV cache of the first request, with its graphs.
    assert len(capture.graphs) == 3
    (memory,) = stage._memory._idle.values()
    assert sorted(memory._graphs) == [(False, (("first_frame", first),)) for first in (0, 2, 4)]


def test_concurrent_requests_share_no_kv_cache(loop: CausalLoop) -> None:
    """A complete second request runs between two blocks of the first request."""
    stage, _ = with_graphs(loop)
    one, other = loop.inputs(FRAMES, 1), loop.inputs(FRAMES, 2)
    expected = loop.run(one), loop.run(other)
    between: list[Tensor] = []
    recorded = RecordedCall()
    call = recorded.call()

    def interrupt(slot: str, index: int, item: Any) -> None:
        call.on_item(slot, index, item)
        if slot == BLOCKS and index == 0:
            (leased,) = stage._memory._leased.values()
            cache = leased._memory["kv_cache"].clone()
            between.append(video_of(stage, other))
            assert torch.equal(leased._memory["kv_cache"], cache)

    stage.run(one, replace(call, on_item=interrupt))
    assert torch.equal(recorded.video, expected[0])
    assert torch.equal(between[0], expected[1])
    addresses = [memory._memory["kv_cache"].data_ptr() for memory in stage._memory._idle.values()]
    assert len(set(addresses)) == 2


def test_the_kv_cache_is_as_long_as_the_video_or_the_window(loop: CausalLoop, windowed: CausalLoop) -> None:
    """The shape is (layers, 2 (K, V), outputs, tokens, heads, head size); a frame has six tokens."""
    for each, frames in ((loop, 6), (windowed, 4)):
        model = each.modules["transformer"]
        assert isinstance(model, CausalWanTransformer3DModel)
        prepared = model.prepare(torch.zeros(2, 3), torch.zeros(3, 32, 32), torch.empty(1, 0, 6, 4, 6))
        assert prepared.memory["kv_cache"].shape == (2, 2, 3, frames * 6, 4, 16)


def test_a_kv_cache_that_exceeds_step_memory_is_refused_before_the_first_step(loop: CausalLoop) -> None:
    stage, _ = with_graphs(loop, max_bytes=1000)
    recorded = RecordedCall()
    with pytest.raises(ResourceExhausted):
        stage.run(loop.inputs(FRAMES), recorded.call())
    assert not recorded.steps


def test_frames_that_do_not_fill_whole_blocks_are_refused(loop: CausalLoop) -> None:
    x = loop.inputs(FRAMES)
    part = x.initial_latents.parts["video"]
    odd = {"video": replace(part, latents=part.latents[:, :, :5])}
    with pytest.raises(InvalidInput, match="5 latent frames are not a multiple of 2, the frames of a block; 4 works"):
        loop.run(replace(x, initial_latents=replace(x.initial_latents, parts=odd)))


def test_a_step_cache_is_refused_when_the_model_loads(loop: CausalLoop) -> None:
    model = open_model(str(loop.path), load_registry())
    cached = Runtime(approximation=Approximation(step_cache_threshold=0.1))
    with pytest.raises(InvalidInput, match=r"step_cache_threshold: 0\.1 is not 0; .* has no step cache") as caught:
        load_stages(model, model.service("denoising"), cached)
    assert caught.value.field == "step_cache_threshold"


@pytest.mark.parametrize(
    ("num_frames", "rounded"), [(1, 5), (5, 5), (9, 5), (12, 13), (13, 13), (17, 13), (21, 21), (81, 77), (84, 85)]
)
def test_frames_are_rounded_to_whole_blocks(folder: Path, num_frames: int, rounded: int) -> None:
    """First to 4n + 1 frames, as Diffusers does (84 to 85), then to whole blocks."""
    path = build_tiny_wan_causal(folder / f"rounded-{num_frames}", sliding_window_num_frames=22)
    given: dict[str, Any] = {"prompt": "", "num_frames": num_frames}
    params, warnings = WanCausalDMDSamplingParams.build(given, Checkpoint.open(path))
    assert params.num_frames == rounded
    assert [each.field for each in warnings] == ([] if num_frames == rounded else ["num_frames"])


def test_more_frames_than_the_model_supports_are_refused_without_a_window(
    loop: CausalLoop, windowed: CausalLoop
) -> None:
    given: dict[str, Any] = {"prompt": "", "num_frames": 161}
    with pytest.raises(InvalidInput, match="161 is not at most 77; 77 works") as caught:
        WanCausalDMDSamplingParams.build(given, Checkpoint.open(loop.path))
    assert caught.value.field == "num_frames"
    params, _ = WanCausalDMDSamplingParams.build(given, Checkpoint.open(windowed.path))
    assert params.num_frames == 157


def test_the_defaults_equal_self_forcing(folder: Path) -> None:
    """Published directories name the causal class, but omit its sizes."""
    path = build_tiny_wan(folder / "published")
    edit_json(path / "model_index.json", {"_class_name": "WanCausalDMDPipeline"})
    edit_json(path / "transformer" / "config.json", {"_class_name": "CausalWanTransformer3DModel"})
    params, warnings = WanCausalDMDSamplingParams.build({"prompt": ""}, Checkpoint.open(path))
    assert (params.dmd_denoising_steps, params.flow_shift) == ((1000.0, 750.0, 500.0, 250.0), 5.0)
    assert (params.num_inference_steps, params.guidance_scale, params.num_frames) == (4, 1.0, 81)
    assert not warnings
    config = WanCausalDMDPipelineConfig.from_checkpoint(Checkpoint.open(path)).transformer
    assert (config.num_frames_per_block, config.local_attn_size, config.max_frames) == (3, None, 21)


def test_a_checkpoint_without_a_causal_transformer_config_is_refused(folder: Path) -> None:
    path = build_tiny_wan(folder / "plain")
    edit_json(path / "model_index.json", {"_class_name": "WanCausalDMDPipeline"})
    with pytest.raises(CheckpointError, match=r"_class_name: 'WanTransformer3D.*num_frames_per_block is missing"):
        open_model(str(path), load_registry())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"local_attn_size": 2, "sink_size": 1}, "local_attn_size: 2 is not at least 3"),
        ({"sliding_window_num_frames": 1}, "sliding_window_num_frames: 1 is not at least 2"),
        ({"independent_first_frame": True}, "independent_first_frame: True is not False"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"image_dim": 24, "added_kv_proj_dim": 64}, "image_dim: 24 is not null"),
        ({"num_frames_per_block": 0}, "num_frames_per_block: 0 is not a whole number"),
    ],
)
def test_invalid_causal_configs_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        CausalWanTransformerConfig.from_dict("transformer", {"num_frames_per_block": 2, **entries})


def test_the_services_generate_a_video(loop: CausalLoop) -> None:
    """The loop streams blocks to the decoder, which returns the latents and pixels of all blocks."""
    fleet = open_fleet(str(loop.path))
    given: dict[str, ParamValue] = {"seed": 3, "prompt": "a red apple", "num_frames": FRAMES, **SIZE}
    tensors = fleet.tensors(None, NO_IMAGES, **given)
    fleet.close()
    assert tensors["latents"].shape[2] == 3 * BLOCK
    assert FRAMES in tensors["pixels"].shape
    assert bool(tensors["pixels"].isfinite().all())


def test_a_warm_up_runs_the_loop(loop: CausalLoop) -> None:
    """A warm-up request has all blocks of a video of its size."""
    model = open_model(str(loop.path), load_registry())
    (inputs,) = WarmUp.parse(model, ("32x48x13",)).inputs(torch.float32)
    recorded = RecordedCall()
    loop.stage().run(loop.stage().Input(**inputs), recorded.call())
    assert len(recorded.blocks) == 2
