"""The denoising loop of LTX-2 for text and image: byte-equal resume, branches, first latent frame."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coarse_images import coarse_image, png
from common.artifacts import ImageInputs, ParamValue, Sampling, StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import Cancelled, CheckpointError
from common.local import HostedStages
from common.stage import Call
from common.tensors import TORCH
from configs.models.vaes.ltx2 import LTX2AudioVAEConfig, LTX2VideoVAEConfig
from configs.pipeline_configs.ltx2 import LTX2ImageToVideoPipelineConfig, LTX2PipelineConfig
from configs.sample.ltx2 import LTX2SamplingParams
from fake_graphs import FakeCapture
from models.catalog import ServedModel, open_model
from models.contracts import DenoisingInput
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.stages.step_memory import StepMemoryPool
from models.validation import InputValidationStage
from models.warm_up import WarmUp
from step_checkpoints import step_checkpoints_to
from tiny_ltx2 import build_tiny_ltx2, edit_json

STEPS = 4
KINDS = ("text", "image")
USUAL: dict[str, ParamValue] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 96,
    "num_frames": 17,
    "num_inference_steps": STEPS,
    "seed": 3,
    "spatio_temporal_guidance_blocks": (1.0,),
    "max_sequence_length": 16,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(str(build_tiny_ltx2(tmp_path_factory.mktemp("ltx2") / "m")), load_registry())


class Loop:
    """The denoising stage of one variant, and its inputs for a request."""

    def __init__(self, model: ServedModel, kind: str, dtype: torch.dtype = torch.float32, **runtime: Any) -> None:
        self.model = model
        self.kind = kind
        self.runtime = Runtime(dtype=dtype, **runtime)
        (self.stage,) = load_stages(model, model.service("denoising"), self.runtime, variant=kind)
        assert isinstance(self.stage, DenoisingStage)

    def inputs(self, **given: ParamValue) -> DenoisingInput:
        images = {"image": png(coarse_image(90, 60))} if self.kind == "image" else {}
        validated = InputValidationStage(self.model).run({**USUAL, **given}, images)
        values: dict[str, Any] = dict(validated.artifacts)
        if images:
            files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
            values["image_inputs"] = ImageInputs(images=files)
        for spec in validated.variant.services:
            if spec.service == "denoising":
                return DenoisingInput(**{slot: values[slot] for slot in spec.contract.inputs if slot in values})
            stages = load_stages(self.model, spec, Runtime(dtype=self.runtime.dtype), variant=self.kind)
            hosted = HostedStages(spec.service, stages)
            given_slots = {slot: values[slot] for slot in hosted.contract.inputs if slot in values}
            values |= hosted.run(given_slots, Call("before"))
        raise AssertionError("the pipeline has no denoising service")

    def run(self, x: DenoisingInput, **call: Any) -> dict[str, Tensor]:
        done = self.stage.run(x, Call("test", **call))
        return {name: part.latents for name, part in done.denoised_latents.parts.items()}


@pytest.fixture(scope="module", params=KINDS)
def loop(request: pytest.FixtureRequest, model: ServedModel) -> Loop:
    return Loop(model, request.param, step_checkpoint_every=1)


def test_a_loop_resumes_after_every_step_to_the_same_bytes(loop: Loop) -> None:
    """All branches run. Step checkpoints of both latent parts are serialized and parsed, as between workers."""
    x = loop.inputs(num_outputs_per_prompt=2)
    states: list[StepCheckpoint] = []
    whole = loop.run(x, on_item=step_checkpoints_to(states.append))
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        assert set(state.latents.parts) == {"video", "audio"}
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        resumed = loop.run(replace(x, resume_from=sent))
        assert all(torch.equal(resumed[part], whole[part]) for part in whole), f"after step {state.step}"


def test_cancellation_ends_the_loop_within_a_step(loop: Loop) -> None:
    cancelled, done = threading.Event(), []

    def on_progress(step: int, _: int) -> None:
        done.append(step)
        if step == 2:
            cancelled.set()

    with pytest.raises(Cancelled):
        loop.run(loop.inputs(), on_progress=on_progress, cancelled=cancelled)
    assert done == [1, 2]


def test_graphs_give_the_same_bytes_as_eager_steps(model: ServedModel) -> None:
    """Branches have equal shapes, but each has its own graph: two branches skip some of the attention."""
    loop = Loop(model, "image")
    eager, capture = loop.run(loop.inputs()), FakeCapture()
    stage = loop.stage
    assert isinstance(stage, DenoisingStage)
    stage._memory = StepMemoryPool(1 << 30, capture)
    for _ in range(2):
        replayed = loop.run(loop.inputs())
        assert all(torch.equal(replayed[part], eager[part]) for part in eager)
    assert len(capture.graphs) == 4


def test_a_warm_up_runs_the_loop(loop: Loop) -> None:
    stages, progress = HostedStages("denoising", [loop.stage]), []
    warm_up = WarmUp.parse(loop.model, (f"64x96x9@{loop.kind}",))
    warm_up.run(stages.run, torch.float32, Call("warm-up", on_progress=lambda *step: progress.append(step)))
    assert progress == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("positive", "negative", "perturbed", "isolated")),
        ({"guidance_scale": 1.0, "audio_guidance_scale": 1.0}, ("positive", "perturbed", "isolated")),
        ({"guidance_scale": 1.0}, ("positive", "negative", "perturbed", "isolated")),
        ({"stg_scale": 0.0, "audio_stg_scale": 0.0}, ("positive", "negative", "isolated")),
        ({"spatio_temporal_guidance_blocks": (28.0,)}, ("positive", "negative", "isolated")),
        ({"modality_scale": 1.0, "audio_modality_scale": 1.0}, ("positive", "negative", "perturbed")),
    ],
    ids=str,
)
def test_each_enabled_guidance_has_a_branch(
    model: ServedModel, given: dict[str, ParamValue], expected: tuple[str, ...]
) -> None:
    config = LTX2PipelineConfig.from_checkpoint(model.checkpoint)
    params, _ = LTX2SamplingParams.build({**USUAL, **given}, model.checkpoint)
    sampling = params.artifacts()["sampling"]
    assert isinstance(sampling, Sampling)
    has_negative = params.guidance_scale > 1 or params.audio_guidance_scale > 1
    assert config.branches_of(sampling, has_negative=has_negative) == expected
    if given != {"spatio_temporal_guidance_blocks": (28.0,)}:
        assert params.branches == len(expected)


def test_ltx_2_0_has_no_perturbed_branch(tmp_path: Path) -> None:
    """LTX-2.0 blocks cannot skip self-attention: Diffusers' perturbed branch equals the positive branch."""
    config = LTX2PipelineConfig.from_checkpoint(Checkpoint.open(build_tiny_ltx2(tmp_path / "m", version="2.0")))
    sampling = Sampling(
        num_inference_steps=1, seed=1, params={"stg_scale": 1.0, "spatio_temporal_guidance_blocks": (1.0,)}
    )
    assert config.branches_of(sampling, has_negative=True) == ("positive", "negative")


def test_the_first_latent_frame_equals_the_image_latents(model: ServedModel) -> None:
    loop = Loop(model, "image")
    x = loop.inputs(num_outputs_per_prompt=2)
    assert x.image_latents is not None
    condition = x.image_latents.parts["condition"].latents
    assert condition.dtype == torch.float32
    assert torch.equal(loop.run(x)["video"][:, :, :1], condition.expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_keeps_latents_in_float32(model: ServedModel, kind: str) -> None:
    """Cases: all branches, and one branch without guidance."""
    loop = Loop(model, kind, torch.bfloat16)
    off: dict[str, ParamValue] = dict.fromkeys(("guidance_scale", "modality_scale"), 1.0)
    off |= {"audio_guidance_scale": 1.0, "audio_modality_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0}
    for given in ({}, off):
        result = loop.run(loop.inputs(**given))
        assert all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in result.values())
        video = result["video"][:, :, 1:]
        assert not torch.equal(video, video.bfloat16().float()), "no step may round the latents to bfloat16"


def test_shapes_match_the_published_model() -> None:
    """Default size of LTX-2: 121 frames of 512x768 at 24 frames per second."""
    vae = LTX2VideoVAEConfig.from_dict("vae", {})
    audio_vae = LTX2AudioVAEConfig.from_dict("audio_vae", {})
    assert (vae.latent_channels, vae.spatial_factor, vae.latent_frames(121)) == (128, 32, 16)
    assert (audio_vae.latent_length(121, 24.0), audio_vae.token_channels) == (126, 128)


@pytest.mark.parametrize("kind", [LTX2PipelineConfig, LTX2ImageToVideoPipelineConfig])
@pytest.mark.parametrize(
    ("module", "entry", "message"),
    [
        ("transformer", {"in_channels": 12}, "video channels of the transformer and the VAE: 12 is not 8"),
        ("transformer", {"audio_in_channels": 12}, "audio channels of the transformer and the audio VAE: 12 is not 8"),
        ("connectors", {"text_proj_in_factor": 9}, "layers of the connectors and the text encoder: 9 is not 4"),
        (
            "connectors",
            {"video_connector_attention_head_dim": 4},
            "text features for video of the .*: 32 is not",
        ),
        ("vocoder", {"in_channels": 5}, "channels of the vocoder and the audio VAE: 5 is not"),
        ("vocoder", {"output_sampling_rate": 23000}, "output_sampling_rate: 23000 is not a sampling rate of AAC"),
        ("vocoder", {"bwe_out_channels": 6}, "bwe_out_channels: 6 is not 1 or 2; MP4 files have mono or stereo audio"),
        ("vae", {"timestep_conditioning": True}, "timestep_conditioning: True is not False"),
        ("vae", {"spatial_compression_ratio": 64}, "spatial_compression_ratio: 64 is not 32"),
        ("audio_vae", {"base_channels": 128}, "base_channels: 128 is not 8"),
    ],
)
def test_inconsistent_modules_are_refused(
    tmp_path: Path, kind: type[LTX2PipelineConfig], module: str, entry: dict[str, Any], message: str
) -> None:
    path = build_tiny_ltx2(tmp_path / "m")
    edit_json(path / module / "config.json", **entry)
    with pytest.raises(CheckpointError, match=message):
        kind.from_checkpoint(Checkpoint.open(path))
