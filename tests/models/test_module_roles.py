"""Stages find their modules by role, so that a pipeline may use other module names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from coarse_images import coarse_image, png
from common.artifacts import ParamValue
from common.errors import CheckpointError
from local_fleet import NO_IMAGES, LocalFleet, open_fleet
from models.catalog import open_model
from models.registry import Registry, load_registry
from models.warm_up import WarmUp
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v

PLUGIN = """
from models.pipelines.wan import WanPipeline
from models.pipelines.wan_image_to_video import WanImageToVideoPipeline


class {name}({base}):
    pipeline_name = "{name}"
    _required_config_modules = {modules}

    def create_pipeline_stages(self):
        {stages}


def register_configs(registry):
    configs = "configs.{{}}.wan:{prefix}{{}}"
    registry.register_configs(
        "{name}",
        sampling_params=configs.format("sample", "SamplingParams"),
        pipeline_config=configs.format("pipeline_configs", "PipelineConfig"),
    )


EntryClass = {name}
"""
GIVEN: dict[str, ParamValue] = {
    "prompt": "a red apple",
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "seed": 1,
}
COMMON_MODULES = ("text_encoder", "tokenizer", "transformer", "vae")
T2V_STAGES = 'self.add_standard_t2i_stages(scheduler="solver")'
I2V_STAGES = 'self.add_standard_ti2v_stages(image_processor="feature_extractor", scheduler="solver")'


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with Wan pipelines whose scheduler and image processor have other names."""
    plugins = tmp_path_factory.mktemp("plugins")
    t2v, i2v = (*COMMON_MODULES, "solver"), (*COMMON_MODULES, "image_encoder", "feature_extractor", "solver")
    for name, base, modules, stages in (
        ("SolverWanPipeline", "WanPipeline", t2v, T2V_STAGES),
        ("SolverWanImageToVideoPipeline", "WanImageToVideoPipeline", i2v, I2V_STAGES),
    ):
        text = PLUGIN.format(name=name, base=base, prefix=base.removesuffix("Pipeline"), modules=modules, stages=stages)
        (plugins / f"{name.lower()}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(plugins)
        yield load_registry([plugins])


def renamed(path: Path, target: Path, names: Sequence[tuple[str, str]]) -> Path:
    """Copy a checkpoint, rename some of its modules, and select the plugin pipeline with the new names."""
    shutil.copytree(path, target)
    index = json.loads((path / "model_index.json").read_text())
    index["_class_name"] = f"Solver{index['_class_name']}"
    for old, new in names:
        index[new] = index.pop(old)
        (target / old).rename(target / new)
    (target / "model_index.json").write_text(json.dumps(index))
    return target


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a copy whose scheduler is named "solver"."""
    path = build_tiny_wan(tmp_path_factory.mktemp("wan") / "t2v")
    return path, renamed(path, path.with_name("t2v-solver"), [("scheduler", "solver")])


def test_a_renamed_scheduler_gives_the_same_bytes(t2v: tuple[Path, Path], registry: Registry) -> None:
    plain, renamed_fleet = open_fleet(str(t2v[0])), LocalFleet(open_model(str(t2v[1]), registry))
    ours, theirs = renamed_fleet.tensors(None, NO_IMAGES, **GIVEN), plain.tensors(None, NO_IMAGES, **GIVEN)
    assert renamed_fleet.model.service("denoising").modules == ("transformer", "solver")
    assert all(torch.equal(ours[name], theirs[name]) for name in ("latents", "pixels"))
    plain.close()
    renamed_fleet.close()


def test_a_renamed_image_processor_gives_the_same_bytes(tmp_path: Path, registry: Registry) -> None:
    path = build_tiny_wan_i2v(tmp_path / "i2v")
    names = [("scheduler", "solver"), ("image_processor", "feature_extractor")]
    plain = open_fleet(str(path))
    renamed_fleet = LocalFleet(open_model(str(renamed(path, tmp_path / "renamed", names)), registry))
    images = {"image": png(coarse_image(40, 30, 1))}
    ours, theirs = (fleet.tensors(None, images, **GIVEN) for fleet in (renamed_fleet, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("latents", "pixels"))
    plain.close()
    renamed_fleet.close()


def test_a_warm_up_has_all_inputs_of_a_renamed_denoising_service(t2v: tuple[Path, Path], registry: Registry) -> None:
    model = open_model(str(t2v[1]), registry)
    (inputs,) = WarmUp.parse(model, ["32x32x5"]).inputs(torch.float32)
    contract = model.service("denoising").contract
    assert inputs.keys() == contract.inputs.keys() - contract.optional


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"solver_p": "x"}, "solver_p is not supported"),
        ({"use_dynamic_shifting": True}, r"solver/scheduler_config\.json: UniPCMultistepScheduler cannot run 50 steps"),
    ],
)
def test_the_config_of_a_renamed_scheduler_is_checked(
    t2v: tuple[Path, Path], registry: Registry, tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    path = tmp_path / "edited"
    shutil.copytree(t2v[1], path)
    file = path / "solver" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises(CheckpointError, match=message):
        LocalFleet(open_model(str(path), registry))
