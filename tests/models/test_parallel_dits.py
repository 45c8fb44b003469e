"""Parallel layouts of every DiT equal one rank; in most cases, no degree divides the token count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InvalidInput
from denoising_files import load_input, save_input
from local_fleet import relative_error
from models.catalog import open_model
from models.loader import load_stages
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh
from models.registry import load_registry
from models.runtime import Runtime
from parallel_cases import FAMILIES, LAYOUTS, Case, check, make_case
from rank_calls import denoise, rank_file
from rank_pool import RankPool

# World size 4: degree 2 on two axes.
PAIRS_OF_AXES = [layout for layout in LAYOUTS if layout.world_size == 4 and max(map(layout.of, AXES)) == 2]
# Degree 2 on each axis, and on one pair of axes.
FEW_LAYOUTS = [*(Degrees(**{axis: 2}) for axis in AXES), Degrees(tp=2, ulysses=2)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(1)
    return {name: make_case(family, tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_every_layout_of_flux_equals_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    check(rank_pool, cases["flux"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", PAIRS_OF_AXES, ids=str)
@pytest.mark.parametrize("family", ["qwen-image", "qwen-image-edit", "wan", "wan-i2v"])
def test_pairs_of_axes_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees
) -> None:
    check(rank_pool, cases[family], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_glm_image_layouts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """The positive branch has more glyph tokens than ranks, the negative branch fewer."""
    check(rank_pool, cases["glm-image"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_layouts_with_three_token_segments_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Every rank has a shard of the text, of the generated image and of the input images."""
    check(rank_pool, cases["qwen-image-edit-plus"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_layered_image_layouts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    check(rank_pool, cases["qwen-image-layered"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_hunyuan_video_layouts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Refined text has a row per step; the negative branch has one text token."""
    check(rank_pool, cases["hunyuan-video"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_z_image_layouts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Image self-attention precedes joint attention with the text; guidance is truncated at a step."""
    check(rank_pool, cases["z-image"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_flux2_layouts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Each block type fuses different projections; tokens of noise and reference images are sharded."""
    check(rank_pool, cases["flux2-klein"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", [Degrees(ring=2), Degrees(tp=2, ulysses=2)], ids=str)
def test_flux2_layouts_with_embedded_guidance_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    check(rank_pool, cases["flux2-dev"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["wan-ti2v", "ltx-video"])
def test_layouts_with_two_token_segments_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees
) -> None:
    """Every rank has a shard of the first frame and a shard of the other frames."""
    check(rank_pool, cases[family], degrees, tmp_path)


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("wan-dmd", Degrees(tp=2)),
        ("wan-dmd", Degrees(ulysses=2)),
        ("wan-dmd", Degrees(ring=2)),
        ("wan-causal", Degrees(tp=2)),
        ("wan-causal", Degrees(ulysses=2)),
        ("wan-causal", Degrees(tp=2, ulysses=2)),
    ],
    ids=str,
)
def test_layouts_of_few_step_models_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees
) -> None:
    """All ranks add the same noise. The KV cache of a causal model is sharded by heads."""
    check(rank_pool, cases[family], degrees, tmp_path)


def test_a_causal_model_refuses_a_ring_degree_above_1(cases: dict[str, Case]) -> None:
    model = open_model(cases["wan-causal"].checkpoint, load_registry())
    degrees = Degrees(ring=2)
    mesh = WorkerMesh(degrees, torch.device("cpu"), 0, {axis: Axis(degrees.of(axis)) for axis in AXES})
    with pytest.raises(InvalidInput, match=r"ring: 2 is not 1; .* has the axes tp, ulysses$") as caught:
        load_stages(model, model.service("denoising"), Runtime(mesh=mesh))
    assert caught.value.field == "ring"


@pytest.mark.parametrize("degrees", FEW_LAYOUTS, ids=str)
def test_layouts_with_two_experts_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Each expert is sharded separately."""
    check(rank_pool, cases["wan-a14b"], degrees, tmp_path)


@pytest.mark.parametrize("degrees", [*FEW_LAYOUTS, Degrees(ulysses=2, ring=2)], ids=str)
def test_layouts_with_video_audio_and_four_branches_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    """Video tokens are sharded, audio tokens are replicated."""
    check(rank_pool, cases["ltx2"], degrees, tmp_path)


@pytest.mark.parametrize(
    ("approximation", "max_error"),
    [({"linear_dtype": "float8"}, 0.05), ({"step_cache_threshold": 0.7}, 1e-4)],
    ids=["float8", "step-cache"],
)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_approximations_agree_between_ranks(
    rank_pool: RankPool,
    cases: dict[str, Case],
    tmp_path: Path,
    family: str,
    approximation: dict[str, Any],
    max_error: float,
) -> None:
    """All ranks reuse the same steps; each shard of a float8 weight has its own scales."""
    loop = str(cases[family].loop)
    given: dict[str, Any] = {"checkpoint": cases[family].checkpoint, "inputs": loop, "approximation": approximation}
    rank_pool.join(Degrees(tp=2, ulysses=2))
    rank_pool.call("rank_calls:denoise", **given, output=str(tmp_path / "group"))
    results = [load_file(rank_file(str(tmp_path / "group"), rank))["latents"] for rank in range(4)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    denoise(0, **given, output=str(tmp_path / "one"))
    alone = load_file(rank_file(str(tmp_path / "one"), 0))["latents"]
    assert relative_error(results[0], alone) <= max_error
    assert relative_error(alone, cases[family].latents) > 1e-3, "the approximation must change the result"


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("flux", Degrees(tp=2, ulysses=2)), ("wan", Degrees(tp=2, ring=2)), ("ltx2", Degrees(tp=2, ring=2))],
    ids=str,
)
def test_a_block_compiles_to_one_graph(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, family: str, degrees: Degrees
) -> None:
    """torch.compile traces the collectives; a graph break is an error."""
    case, output = cases[family], str(tmp_path / "single")
    rank_pool.join(degrees)
    rank_pool.call(
        "rank_calls:forward", checkpoint=case.checkpoint, inputs=str(case.single), output=output, compiled=True
    )
    assert relative_error(load_file(rank_file(output, 0))["prediction"], case.prediction) <= 1e-5


@pytest.mark.parametrize("degrees", [Degrees(tp=2), Degrees(ulysses=2), Degrees(ring=2)], ids=str)
def test_cfg_parallel_branches_equal_sequential_branches(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path, degrees: Degrees
) -> None:
    case, latents = cases["flux"], []
    for layout in (degrees, replace(degrees, cfg=2)):
        rank_pool.join(layout)
        output = str(tmp_path / str(layout.cfg))
        rank_pool.call("rank_calls:denoise", checkpoint=case.checkpoint, inputs=str(case.loop), output=output)
        latents += [load_file(rank_file(output, rank))["latents"] for rank in range(layout.world_size)]
    assert all(torch.equal(each, latents[0]) for each in latents)


def test_cfg_ranks_with_a_single_branch_equal_one_rank(
    rank_pool: RankPool, cases: dict[str, Case], tmp_path: Path
) -> None:
    case, inputs, output = cases["flux"], tmp_path / "in", str(tmp_path / "out")
    x = load_input(case.loop)
    save_input(replace(x, text_conditioning=replace(x.text_conditioning, negative_prompt_embeds={})), inputs)
    denoise(0, case.checkpoint, str(inputs), str(tmp_path / "one"))
    rank_pool.join(Degrees(cfg=2))
    rank_pool.call("rank_calls:denoise", checkpoint=case.checkpoint, inputs=str(inputs), output=output)
    files = (rank_file(str(tmp_path / "one"), 0), rank_file(output, 0), rank_file(output, 1))
    expected, *got = (load_file(file)["latents"] for file in files)
    assert all(torch.equal(each, expected) for each in got)
    assert not torch.equal(expected, case.latents), "guidance must change the result"
