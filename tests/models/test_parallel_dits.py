"""Every way to share a DiT out gives what one rank gives, with lengths that divide by nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.artifacts import Canvas, Conditioning, LatentPart, Latents, Sampling
from common.local import HostedStages
from common.stage import Call
from configs.pipeline_configs.base import StandardPipelineConfig
from denoising_files import load_input, save_input
from local_fleet import relative_error
from models.catalog import ServedModel, open_model
from models.contracts import DenoisingInput
from models.layers.mesh import AXES, Degrees
from models.loader import load_stages
from models.registry import load_registry, resolve
from rank_calls import denoise, forward, rank_file
from rank_pool import RankPool
from tiny_flux import LATENT_CHANNELS, build_tiny_flux
from tiny_qwen_image import build_tiny_qwen_image, build_tiny_qwen_image_edit
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v

CPU = torch.device("cpu")
STEPS = 4

# All of up to four ranks.
LAYOUTS = [
    Degrees(tp, ulysses, ring, cfg)
    for tp, ulysses, ring, cfg in product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2))
    if tp * ulysses * ring * cfg <= 4
]
PAIRS = [layout for layout in LAYOUTS if layout.world_size == 4 and max(map(layout.of, AXES)) == 2]


@dataclass(frozen=True)
class Family:
    """A checkpoint, and a request whose tokens divide by little.

    Embeddings are (tokens, width) or (width,); latents of pictures are of the shapes packed and raw.
    """

    build: Callable[[Path], Path]
    canvas: Canvas
    tokens: int
    positive: Mapping[str, tuple[int, ...]]
    negative: Mapping[str, tuple[int, ...]]
    pictures: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    condition: tuple[tuple[int, ...], tuple[int, ...]] | None = None


SAMPLING = Sampling(num_inference_steps=STEPS, seed=3, num_outputs_per_prompt=2, guidance_scale=4.0, true_cfg_scale=2.0)
FAMILIES = {
    "flux": Family(
        build_tiny_flux,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, 32), "pooled_projections": (24,)},
        negative={"encoder_hidden_states": (11, 32), "pooled_projections": (24,)},
        tokens=35,
    ),
    "qwen-image": Family(
        build_tiny_qwen_image,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (3, 32)},
        tokens=35,
    ),
    "qwen-image-edit": Family(
        build_tiny_qwen_image_edit,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (6, 32)},
        condition=((1, 15, 64), (1, 1, 16, 6, 10)),
        tokens=35,
    ),
    "wan": Family(
        build_tiny_wan,
        Canvas(height=80, width=112, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        tokens=35,
    ),
    "wan-i2v": Family(
        build_tiny_wan_i2v,
        Canvas(height=48, width=80, num_frames=9, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        pictures={"encoder_hidden_states_image": (17, 24)},
        condition=((1, 20, 3, 6, 10), (1, 20, 3, 6, 10)),
        tokens=45,
    ),
}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, its input for the loop and for one prediction, and what one rank makes of them."""

    checkpoint: str
    loop: Path
    single: Path
    latents: Tensor
    prediction: Tensor


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)
    return {name: make_case(family, tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


def make_case(family: Family, folder: Path) -> Case:
    """Draw a request, and run it on one rank."""
    model = open_model(str(family.build(folder / "checkpoint")), load_registry())
    x = draw_input(model, family)
    save_input(x, folder / "loop.safetensors")
    save_file(single_input(model, x), folder / "single.safetensors")
    checkpoint = str(model.checkpoint.path)
    made: dict[str, Tensor] = {}
    for function, file in ((denoise, "loop"), (forward, "single")):
        function(0, checkpoint, str(folder / f"{file}.safetensors"), str(folder / file))
        made |= load_file(rank_file(str(folder / file), 0))
    return Case(checkpoint, folder / "loop.safetensors", folder / "single.safetensors", **made)


def draw_input(model: ServedModel, family: Family) -> DenoisingInput:
    """Noise and schedule of the family's own stages; what encoders would make is random."""
    torch.manual_seed(5)
    stages = load_stages(model, model.pipeline.service("latent_preparation"), device=CPU, dtype=torch.float32)
    given = {"canvas": family.canvas, "sampling": SAMPLING}
    prepared = HostedStages("latent_preparation", stages).run(given, Call("test"))
    (noise,) = prepared["initial_latents"].parts.values()
    assert noise.latents[0].numel() == family.tokens * 2 * 2 * LATENT_CHANNELS
    condition = None
    if family.condition:
        packed, raw = family.condition
        part = LatentPart(latents=torch.randn(packed), raw_latent_shape=raw)
        condition = Latents(parts={"condition": part})
    return DenoisingInput(
        initial_latents=prepared["initial_latents"],
        schedule=prepared["schedule"],
        text_conditioning=Conditioning(
            prompt_embeds=draw(family.positive), negative_prompt_embeds=draw(family.negative)
        ),
        image_conditioning=Conditioning(prompt_embeds=draw(family.pictures)) if family.pictures else None,
        image_latents=condition,
        canvas=family.canvas,
        sampling=SAMPLING,
    )


def draw(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(1, *size) for name, size in sizes.items()}


def single_input(model: ServedModel, x: DenoisingInput) -> dict[str, Tensor]:
    """The keywords of one prediction in the middle of the schedule, for the first output."""
    config_class: type[StandardPipelineConfig] = resolve(model.entry.pipeline_config)
    config = config_class.from_checkpoint(model.checkpoint)
    (noise,) = x.initial_latents.parts.values()
    condition, raw = None, None
    if x.image_latents is not None:
        part = x.image_latents.parts["condition"]
        condition, raw = part.latents, part.raw_latent_shape
    embeds = {**x.text_conditioning.prompt_embeds}
    shape = (1, *noise.raw_latent_shape[1:])
    keywords = {
        **embeds,
        **(x.image_conditioning.prompt_embeds if x.image_conditioning else {}),
        **config.prepare_pos_cond_kwargs(embeds, shape, x.sampling, raw),
        "hidden_states": config.model_input(noise.latents[:1], condition),
        "timestep": config.model_timestep(x.schedule.timesteps[1:2]),
    }
    return {name: value.contiguous() for name, value in keywords.items() if value is not None}


def check(pool: RankPool, case: Case, degrees: Degrees, folder: Path) -> None:
    """Prediction and loop, on every rank, against one rank's."""
    pool.join(degrees)
    single = {"checkpoint": case.checkpoint, "inputs": str(case.single), "output": str(folder / "single")}
    loop = {"checkpoint": case.checkpoint, "inputs": str(case.loop), "output": str(folder / "loop")}
    pool.call("rank_calls:forward", **single)
    assert pool.call("rank_calls:denoise", **loop) == [[*range(1, STEPS + 1)]] * degrees.world_size
    for name, expected, most in (("single", case.prediction, 1e-5), ("loop", case.latents, 1e-4)):
        results = [load_file(rank_file(str(folder / name), rank)) for rank in range(degrees.world_size)]
        (got, *others) = [tensor for result in results for tensor in result.values()]
        assert relative_error(got, expected) <= most, name
        assert all(torch.equal(got, other) for other in others), f"{name}: ranks disagree"
        if degrees.world_size == degrees.cfg:
            assert torch.equal(got, expected), f"{name}: the branches have the shapes that they have on one rank"


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_every_layout(rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees) -> None:
    check(rank_pool, cases["flux"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", PAIRS, ids=str)
@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-edit", "wan", "wan-i2v"])
def test_pairs(rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees) -> None:
    check(rank_pool, cases[family], degrees, tmp_path)


@pytest.mark.parametrize(
    ("approximation", "most"),
    [({"linear_dtype": "float8"}, 0.05), ({"step_cache_threshold": 0.7}, 1e-4)],
    ids=["float8", "step-cache"],
)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_ranks_approximate_alike(
    rank_pool: RankPool,
    cases: dict[str, Case],
    tmp_path: Path,
    family: str,
    approximation: dict[str, Any],
    most: float,
) -> None:
    """All skip the same steps; parts of a weight have scales of their own."""
    loop = str(cases[family].loop)
    given: dict[str, Any] = {"checkpoint": cases[family].checkpoint, "inputs": loop, "approximation": approximation}
    rank_pool.join(Degrees(tp=2, ulysses=2))
    rank_pool.call("rank_calls:denoise", **given, output=str(tmp_path / "group"))
    results = [load_file(rank_file(str(tmp_path / "group"), rank))["latents"] for rank in range(4)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    denoise(0, **given, output=str(tmp_path / "one"))
    alone = load_file(rank_file(str(tmp_path / "one"), 0))["latents"]
    assert relative_error(results[0], alone) <= most
    assert relative_error(alone, cases[family].latents) > 1e-3, "something was approximated"


@pytest.mark.parametrize(
    ("family", "degrees"), [("flux", Degrees(tp=2, ulysses=2)), ("wan", Degrees(tp=2, ring=2))], ids=str
)
def test_a_block_is_one_graph(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees
) -> None:
    """torch.compile traces the collectives; a break in the graph would be an error."""
    case, output = cases[family], str(tmp_path / "single")
    rank_pool.join(degrees)
    rank_pool.call(
        "rank_calls:forward", checkpoint=case.checkpoint, inputs=str(case.single), output=output, compiled=True
    )
    assert relative_error(load_file(rank_file(output, 0))["prediction"], case.prediction) <= 1e-5


@pytest.mark.parametrize("degrees", [Degrees(tp=2), Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_branches_side_by_side_are_the_branches_in_turn(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    case, latents = cases["flux"], []
    for layout in (degrees, replace(degrees, cfg=2)):
        rank_pool.join(layout)
        output = str(tmp_path / str(layout.cfg))
        rank_pool.call("rank_calls:denoise", checkpoint=case.checkpoint, inputs=str(case.loop), output=output)
        latents += [load_file(rank_file(output, rank))["latents"] for rank in range(layout.world_size)]
    assert all(torch.equal(each, latents[0]) for each in latents)


def test_cfg_ranks_agree_where_there_is_one_branch(rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path) -> None:
    case, inputs, output = cases["flux"], tmp_path / "in", str(tmp_path / "out")
    x = load_input(case.loop)
    save_input(replace(x, text_conditioning=replace(x.text_conditioning, negative_prompt_embeds={})), inputs)
    denoise(0, case.checkpoint, str(inputs), str(tmp_path / "one"))
    rank_pool.join(Degrees(cfg=2))
    rank_pool.call("rank_calls:denoise", checkpoint=case.checkpoint, inputs=str(inputs), output=output)
    files = (rank_file(str(tmp_path / "one"), 0), rank_file(output, 0), rank_file(output, 1))
    expected, *got = (load_file(file)["latents"] for file in files)
    assert all(torch.equal(each, expected) for each in got)
    assert not torch.equal(expected, case.latents), "guidance would make a difference"
