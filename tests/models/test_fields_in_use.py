"""Every slot that a pipeline declares is read by a stage. A subclass of each stage's Input records the reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from coarse_images import coarse_image, png
from common.artifacts import Canvas, Prompt
from common.local import HostedStages
from common.pipeline import StageSpec
from common.stage import Call, PipelineStage
from configs.pipeline_configs.qwen_image_edit import QwenImageEditPipelineConfig
from configs.sample.qwen_image_layered import QwenImageLayeredSamplingParams
from local_fleet import LocalFleet, open_fleet
from models.registry import load_registry
from tiny_flux2 import build_tiny_flux2_dev, build_tiny_flux2_klein
from tiny_glm_image import build_tiny_glm_image
from tiny_hunyuan_video import build_tiny_hunyuan_video
from tiny_ltx2 import build_tiny_ltx2, build_tiny_ltx2_i2v
from tiny_ltx_video import build_tiny_ltx_video, build_tiny_ltx_video_095
from tiny_qwen_image import (
    build_tiny_qwen_image,
    build_tiny_qwen_image_edit,
    build_tiny_qwen_image_edit_plus,
    build_tiny_qwen_image_layered,
)
from tiny_wan import (
    build_tiny_wan,
    build_tiny_wan_a14b,
    build_tiny_wan_a14b_i2v,
    build_tiny_wan_causal,
    build_tiny_wan_dmd,
    build_tiny_wan_i2v,
    build_tiny_wan_ti2v,
)
from tiny_z_image import build_tiny_z_image

Slot = tuple[str, str]
"""(name of a stage's contract, name of one of its slots)"""


@dataclass
class Recorder:
    """Records the slots that stages read."""

    reads: set[Slot] = field(default_factory=set)

    def watch(self, stage: PipelineStage[Any, Any]) -> None:
        """Record each input slot that this stage reads."""
        contract, reads = stage.contract, self.reads

        class Recorded(stage.Input):  # type: ignore[misc, name-defined]
            def __getattribute__(self, name: str) -> Any:
                if name in contract.inputs:
                    reads.add((contract.name, name))
                return super().__getattribute__(name)

        vars(stage)["Input"] = Recorded

    def unread_inputs(self, stages: Iterable[StageSpec]) -> set[Slot]:
        """Declared inputs that the declaring stage has not read."""
        return {(each.contract.name, slot) for each in stages for slot in each.contract.inputs} - self.reads

    def unread_outputs(self, stages: Iterable[StageSpec]) -> set[Slot]:
        """Declared outputs that no stage has read, except for the pipeline's result."""
        read = {slot for _, slot in self.reads}
        return {
            (each.contract.name, slot)
            for each in stages
            for slot in each.contract.outputs
            if slot not in read and slot != each.result
        }


class Build(Protocol):
    """Function that writes a small checkpoint."""

    def __call__(self, path: Path, /) -> Path:
        """Write the checkpoint to `path`; returns the checkpoint's directory."""


@dataclass(frozen=True)
class Case:
    """A small request of one variant of a family. `build` is a builder, or the name of a shipped model."""

    build: Build | str
    given: Mapping[str, Any]
    has_image: bool = False
    variant: str = ""


_SMALL: Mapping[str, Any] = {"prompt": "a red apple", "height": 32, "width": 32, "num_inference_steps": 2}
_LAYERS: Mapping[str, Any] = {"prompt": "a red apple", "layers": 1, "num_inference_steps": 2}
_VIDEO: Mapping[str, Any] = {**_SMALL, "num_frames": 5}
_LARGER_VIDEO: Mapping[str, Any] = {**_SMALL, "height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 32}
CASES = {
    "FluxPipeline": Case("emoji", {**_SMALL, "negative_prompt": "car", "true_cfg_scale": 2.0}),
    "Flux2KleinPipeline@text": Case(build_tiny_flux2_klein, _SMALL, variant="text"),
    "Flux2KleinPipeline@image": Case(build_tiny_flux2_klein, _SMALL, has_image=True, variant="image"),
    "Flux2Pipeline@text": Case(build_tiny_flux2_dev, _SMALL, variant="text"),
    "Flux2Pipeline@image": Case(build_tiny_flux2_dev, _SMALL, has_image=True, variant="image"),
    "GlmImagePipeline": Case(build_tiny_glm_image, _SMALL),
    "QwenImagePipeline": Case(build_tiny_qwen_image, {**_SMALL, "negative_prompt": "car"}),
    "QwenImageEditPipeline": Case(build_tiny_qwen_image_edit, _SMALL, has_image=True),
    "QwenImageEditPlusPipeline": Case(build_tiny_qwen_image_edit_plus, _SMALL, has_image=True),
    "QwenImageLayeredPipeline": Case(build_tiny_qwen_image_layered, _LAYERS, has_image=True),
    "WanPipeline": Case(build_tiny_wan, _VIDEO),
    "WanPipeline@experts": Case(build_tiny_wan_a14b, _VIDEO, variant="experts"),
    "WanPipeline@text": Case(build_tiny_wan_ti2v, _VIDEO, variant="text"),
    "WanPipeline@image": Case(build_tiny_wan_ti2v, _VIDEO, has_image=True, variant="image"),
    "WanDMDPipeline": Case(build_tiny_wan_dmd, _VIDEO),
    "WanCausalDMDPipeline": Case(build_tiny_wan_causal, _VIDEO),
    "WanImageToVideoPipeline": Case(build_tiny_wan_i2v, _VIDEO, has_image=True),
    "WanImageToVideoPipeline@experts": Case(build_tiny_wan_a14b_i2v, _VIDEO, has_image=True, variant="experts"),
    "LTX2Pipeline@text": Case(build_tiny_ltx2, _LARGER_VIDEO, variant="text"),
    "LTX2Pipeline@image": Case(build_tiny_ltx2, _LARGER_VIDEO, has_image=True, variant="image"),
    "HunyuanVideoPipeline": Case(build_tiny_hunyuan_video, {**_VIDEO, "negative_prompt": "car", "true_cfg_scale": 2.0}),
    "ZImagePipeline": Case(build_tiny_z_image, _SMALL),
    "LTXPipeline@text": Case(build_tiny_ltx_video, _LARGER_VIDEO, variant="text"),
    "LTXPipeline@image": Case(build_tiny_ltx_video, _LARGER_VIDEO, has_image=True, variant="image"),
    "LTXImageToVideoPipeline@image": Case(build_tiny_ltx_video_095, _LARGER_VIDEO, has_image=True, variant="image"),
    "LTX2ImageToVideoPipeline@image": Case(build_tiny_ltx2_i2v, _LARGER_VIDEO, has_image=True, variant="image"),
}
"""Keys are PIPELINE, or PIPELINE@VARIANT for a request of a named variant."""


@contextmanager
def opened(case: Case, directory: Path) -> Iterator[LocalFleet]:
    """The family's model with all its services."""
    fleet = open_fleet(case.build if isinstance(case.build, str) else str(case.build(directory)))
    yield fleet
    fleet.close()


def _encode_small_images(request: pytest.FixtureRequest) -> None:
    """Encode images of Qwen-Image at fewer pixels than Diffusers, to save time; this changes no slot."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setattr(QwenImageEditPipelineConfig, "vae_image_area", 160 * 160)
    patch.setattr(QwenImageLayeredSamplingParams, "pixels_of", lambda resolution: resolution**2 // 64)


@pytest.fixture(scope="module")
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[StageSpec], Recorder]]:
    """By case: the stages of the variant, and the slots that the stages read in one request."""
    by_case = {}
    _encode_small_images(request)
    for name, case in CASES.items():
        recorder = Recorder()
        with opened(case, tmp_path_factory.mktemp("model") / name) as fleet:
            hosted = [each for service in fleet.services.values() for each in vars(service)["_variants"].values()]
            for stage in (stage for stages in hosted for stage in vars(stages)["_stages"]):
                recorder.watch(stage)
            images = {"image": png(coarse_image(80, 70, 1))} if case.has_image else {}
            fleet.media(None, images, **case.given, seed=1)
            variant = fleet.model.variant(case.variant)
            assert variant is not None, f"the model has no variant {case.variant!r}"
            by_case[name] = ([stage for each in variant.services for stage in each.stages], recorder)
    return by_case


def test_every_family_and_variant_has_a_case() -> None:
    registry = load_registry()
    assert sorted({name.partition("@")[0] for name in CASES}) == registry.names()
    served = {f"{name}@{variant}" for name in registry.names() for variant in registry.entry(name).configs if variant}
    # One directory serves both pipelines of Wan 2.2 TI2V, LTX-Video and LTX-2; each has both variants.
    # A variant needs a case of one pipeline only.
    covered = {"WanImageToVideoPipeline@image", "WanImageToVideoPipeline@text"}
    assert served - set(CASES) == covered | {"LTXImageToVideoPipeline@text", "LTX2ImageToVideoPipeline@text"}


def test_each_declared_input_is_read_by_a_family(recorded: dict[str, tuple[list[StageSpec], Recorder]]) -> None:
    all_reads = Recorder({slot for _, recorder in recorded.values() for slot in recorder.reads})
    assert not all_reads.unread_inputs(stage for stages, _ in recorded.values() for stage in stages)


@pytest.mark.parametrize("family", CASES)
def test_each_declared_output_is_read(recorded: dict[str, tuple[list[StageSpec], Recorder]], family: str) -> None:
    stages, recorder = recorded[family]
    assert not recorder.unread_outputs(stages)


@dataclass(frozen=True, kw_only=True)
class CopyInput:
    prompt: Prompt
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class CopyOutput:
    copy: Prompt
    size: Canvas


class CopyStage(PipelineStage[CopyInput, CopyOutput]):
    """A stage that reads only one of its inputs."""

    def run(self, x: CopyInput, call: Call) -> CopyOutput:
        """Copy one input."""
        call.check_cancelled()
        return CopyOutput(copy=x.prompt, size=Canvas(height=1, width=1))


def test_unread_slots_are_found() -> None:
    recorder, stage = Recorder(), CopyStage()
    recorder.watch(stage)
    values = {"prompt": Prompt(prompt="red"), "canvas": Canvas(height=8, width=8)}
    HostedStages("copy", [stage]).run(values, Call("test"))
    spec = StageSpec(CopyStage.contract, "copy", "nowhere:CopyStage", result="copy")
    assert recorder.unread_inputs([spec]) == {("CopyStage", "canvas")}
    assert recorder.unread_outputs([spec]) == {("CopyStage", "size")}
