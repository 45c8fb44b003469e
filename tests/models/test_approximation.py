"""Denoisers that trade exactness for speed, of every family: what is approximated, by how much, who is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import InvalidInput
from common.stage import Call
from configs.approximation import EXACT, Approximation
from local_fleet import relative_error
from models.catalog import ServedModel, open_model
from models.contracts import DenoisingInput
from models.layers.float8 import FLOAT8
from models.layers.linear import JoinedLinear, JoinsWeights
from models.loader import load_stages
from models.registry import load_registry
from models.stages.denoising import DenoisingStage
from models.warm_up import WarmUp
from services.denoising.settings import DenoisingSettings
from tiny_flux import build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image
from tiny_wan import build_tiny_wan_i2v
from toy_checkpoint import build_toy_checkpoint, toy_family

CPU = torch.device("cpu")
FLOAT8_LINEARS = Approximation("float8")
BUILD: dict[str, tuple[Callable[[Path], Path], str, tuple[str, ...]]] = {
    "flux": (build_tiny_flux, "32x48", ("attn", "ff", "ff_context", "proj_mlp", "proj_out")),
    "qwen-image": (build_tiny_qwen_image, "32x48", ("attn", "img_mlp", "txt_mlp")),
    "wan": (build_tiny_wan_i2v, "32x48x5", ("attn1", "attn2", "ffn")),
}
Case = tuple[ServedModel, DenoisingInput, tuple[str, ...]]


@pytest.fixture(scope="module", params=BUILD)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family's small model, a request, and the parts of its blocks that hold the large layers."""
    torch.set_num_threads(1)
    build, size, parts = BUILD[request.param]
    model = open_model(str(build(tmp_path_factory.mktemp("model") / request.param)), load_registry())
    (inputs,) = WarmUp.parse(model, (size,)).inputs(torch.float32)
    return model, DenoisingInput(**inputs), parts


def stage_of(model: ServedModel, approximation: Approximation) -> DenoisingStage:
    spec = model.pipeline.service("denoising")
    (stage,) = load_stages(model, spec, device=CPU, dtype=torch.float32, approximation=approximation)
    assert isinstance(stage, DenoisingStage)
    return stage


def latents_of(stage: DenoisingStage, x: DenoisingInput, call: Call | None = None) -> Tensor:
    (part,) = stage.run(x, call or Call("test")).denoised_latents.parts.values()
    return part.latents


def test_float8_linears(case: Case) -> None:
    """All large layers of the blocks and no others; each weight is held once, in a byte; the result is near."""
    model, x, parts = case
    stage = stage_of(model, FLOAT8_LINEARS)
    transformer: Any = stage._transformer
    quantised = {name for name, value in transformer.named_parameters() if value.dtype == FLOAT8}
    matrices = (name for name, value in transformer.named_parameters() if value.ndim == 2)
    blocks = [name.split(".") for name in matrices if "blocks." in name]
    assert quantised == {".".join(path) for path in blocks if path[2] in parts}
    for module in transformer.modules():
        if isinstance(module, JoinsWeights):
            joined = [value for value in vars(module).values() if isinstance(value, JoinedLinear)]
            assert joined
            assert all(each.weight.values.dtype == FLOAT8 for each in joined)
    error = relative_error(latents_of(stage, x), latents_of(stage_of(model, EXACT), x))
    assert 1e-4 < error < 0.1


def test_a_family_without_such_layers_is_refused(tmp_path: Path) -> None:
    with toy_family(tmp_path / "plugins") as plugins:
        model = open_model(str(build_toy_checkpoint(tmp_path / "toy")), load_registry([plugins]))
        spec = model.pipeline.service("denoising")
        with pytest.raises(InvalidInput, match=r"ToyPipeline has no transformer that can compute with .*float8"):
            load_stages(model, spec, device=CPU, dtype=torch.float32, approximation=FLOAT8_LINEARS)


def test_settings_say_what_is_approximated() -> None:
    assert DenoisingSettings(model="emoji", redis="unix:///x").approximation == EXACT
    given = DenoisingSettings(model="emoji", redis="unix:///x", linear_dtype="float8")
    assert given.approximation == FLOAT8_LINEARS
