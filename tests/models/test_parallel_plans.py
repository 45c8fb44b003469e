"""Parallel plans of all families except LTX-2: completeness, refused plans, weights of one rank.

No rank processes are started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import InvalidInput
from configs.models.dits.flux import FluxTransformerConfig
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.dits.wan import WanTransformerConfig
from configs.models.dits.z_image import ZImageTransformerConfig
from configs.pipeline_configs.flux import FluxPipelineConfig
from flux_pair import Pair
from models.catalog import open_model
from models.dits.base import DiffusionTransformer
from models.dits.flux import FluxTransformer2DModel
from models.dits.flux2 import Flux2Transformer2DModel
from models.dits.flux2_plan import FLUX2_PLAN
from models.dits.flux_plan import FLUX_PLAN
from models.dits.glm_image import GlmImageTransformer2DModel
from models.dits.glm_image_plan import GLM_IMAGE_PLAN
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.hunyuan_video_plan import HUNYUAN_VIDEO_PLAN
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.dits.ltx_video_plan import LTX_VIDEO_PLAN
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.dits.wan import WanTransformer3DModel
from models.dits.wan_plan import WAN_PLAN
from models.dits.z_image import ZImageTransformer2DModel
from models.dits.z_image_plan import Z_IMAGE_PLAN
from models.layers.attention import Attention
from models.layers.module_paths import matches
from models.loader import load_module, load_stages, numerics_fingerprint
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh
from models.parallel.parallelize import parallelize
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument
from models.parallel.shards import parameter_shards
from models.parallel.usp_attention import USPAttention
from models.registry import load_registry
from models.runtime import Runtime
from models.stages.predictor import lease_branch
from models.stages.step_memory import StepMemoryPool
from toy_checkpoint import build_toy_checkpoint, toy_family

CPU = torch.device("cpu")
WAN_I2V = WanTransformerConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
PLANS: dict[str, tuple[ParallelPlan, Callable[[Any], DiffusionTransformer], tuple[Any, ...]]] = {
    "flux": (FLUX_PLAN, FluxTransformer2DModel, (FluxTransformerConfig(guidance_embeds=True),)),
    "flux2": (FLUX2_PLAN, Flux2Transformer2DModel, (Flux2TransformerConfig(),)),
    "glm-image": (GLM_IMAGE_PLAN, GlmImageTransformer2DModel, (GlmImageTransformerConfig(),)),
    "hunyuan-video": (
        HUNYUAN_VIDEO_PLAN,
        HunyuanVideoTransformer3DModel,
        (HunyuanVideoTransformerConfig(),),
    ),
    "ltx-video": (LTX_VIDEO_PLAN, LTXVideoTransformer3DModel, (LTXVideoTransformerConfig(),)),
    "qwen-image": (
        QWEN_IMAGE_PLAN,
        QwenImageTransformer2DModel,
        (QwenImageTransformerConfig(), QwenImageTransformerConfig(use_additional_t_cond=True)),
    ),
    "wan": (WAN_PLAN, WanTransformer3DModel, (WanTransformerConfig(), WAN_I2V)),
    "z-image": (Z_IMAGE_PLAN, ZImageTransformer2DModel, (ZImageTransformerConfig(),)),
}
"""(plan, model class, published configs) by family; LTX-2 is not included."""

ALL_PLANS = pytest.mark.parametrize(("plan", "kind", "configs"), PLANS.values(), ids=PLANS)


def mesh_of_one_rank(degrees: Degrees, **coordinates: int) -> WorkerMesh:
    """The mesh of one rank without the other ranks. A model on this mesh can load weights, but not compute."""
    return WorkerMesh(degrees, CPU, 0, {axis: Axis(degrees.of(axis), coordinates.get(axis, 0)) for axis in AXES})


def on_meta(kind: Callable[[Any], DiffusionTransformer], config: Any) -> DiffusionTransformer:
    with torch.device("meta"):
        return kind(config)


@ALL_PLANS
def test_every_pattern_of_a_plan_matches_a_module(
    plan: ParallelPlan, kind: Callable[[Any], DiffusionTransformer], configs: tuple[Any, ...]
) -> None:
    paths = {path for config in configs for path, _ in on_meta(kind, config).named_modules()}
    for pattern in (*plan.column, *plan.row, *plan.gathered, *plan.norms, *plan.parts, *plan.attention):
        assert any(matches(path, pattern) for path in paths), pattern


@ALL_PLANS
def test_every_block_matrix_is_sharded(
    plan: ParallelPlan, kind: Callable[[Any], DiffusionTransformer], configs: tuple[Any, ...]
) -> None:
    for config in configs:
        model = on_meta(kind, config)
        parallelize(model, plan, mesh_of_one_rank(Degrees(tp=2)), heads=config.num_attention_heads)
        shards = parameter_shards(model)
        whole = {name: value for name, value in model.named_parameters() if name not in shards}
        blocks = {name: value for name, value in whole.items() if "blocks." in name and value.ndim == 2}
        assert not [name for name in blocks if not name.endswith("scale_shift_table")], (
            "only modulation tables may be replicated"
        )
        num_sharded = sum(value.numel() for value in model.parameters())
        num_whole = sum(value.numel() for value in on_meta(kind, config).parameters())
        assert num_sharded / num_whole < 0.52, (
            "each of two ranks holds half of the weights plus small replicated weights"
        )


@ALL_PLANS
def test_attention_is_replaced_at_the_paths_of_the_plan(
    plan: ParallelPlan, kind: Callable[[Any], DiffusionTransformer], configs: tuple[Any, ...]
) -> None:
    """Without tp, no weight is sharded."""
    model = on_meta(kind, configs[0])
    parallelize(model, plan, mesh_of_one_rank(Degrees(ulysses=2, ring=3)), heads=configs[0].num_attention_heads)
    assert not parameter_shards(model)
    replaced = [path for path, module in model.named_modules() if isinstance(module, USPAttention)]
    assert replaced == [
        path
        for path, module in model.named_modules()
        if isinstance(module, Attention) and any(matches(path, pattern) for pattern in plan.attention)
    ]
    assert len({module.scope for module in model.modules() if isinstance(module, USPAttention)}) == 1


def test_requests_with_equal_shards_on_one_rank_have_different_graphs(dev: Pair) -> None:
    """Of 13 or 14 tokens, rank 0 has 7. Rank 1 has 6 or 7, so the collectives in the graphs differ."""
    config = FluxPipelineConfig.from_checkpoint(dev.ours.model.checkpoint)
    runtime = Runtime(mesh=mesh_of_one_rank(Degrees(ulysses=2)))
    transformer = load_module(dev.ours.model.checkpoint, "transformer", config, runtime)
    latents, chunks, keys = {"hidden_states": torch.zeros(1, 35, 64)}, [], []
    for tokens in (13, 14):
        prepared = transformer.prepare(
            torch.ones(1, 1),
            encoder_hidden_states=torch.zeros(1, tokens, 32),
            pooled_projections=torch.zeros(1, 24),
            guidance=torch.ones(1),
            img_ids=torch.zeros(35, 3),
            txt_ids=torch.zeros(tokens, 3),
        )
        assert prepared.lengths == {"text": tokens, "image": 35}
        chunks.append(prepared.constants["text_BTD"].shape)
        with StepMemoryPool(1 << 30, capture=None).leases() as lease:
            keys.append(lease_branch(lease, "transformer", transformer, prepared, latents)._memory.key)
    assert chunks[0] == chunks[1] == (1, 7, 64)
    assert keys[0] != keys[1]


def test_a_plan_for_another_model_is_refused() -> None:
    model = on_meta(FluxTransformer2DModel, FluxTransformerConfig(num_layers=1, num_single_layers=1))
    plan = replace(FLUX_PLAN, column=("transformer_blocks.*.attn",))
    with pytest.raises(TypeError, match=r"transformer_blocks\.0\.attn: JointAttention is not Linear; correct"):
        parallelize(model, plan, mesh_of_one_rank(Degrees(tp=2)), heads=24)
    plan = replace(FLUX_PLAN, parts={"single_transformer_blocks.*.proj_out": (7, 4)})
    with pytest.raises(ValueError, match="proj_out: size 15360 is not a multiple of"):
        parallelize(model, plan, mesh_of_one_rank(Degrees(tp=2)), heads=24)


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2), Degrees(ring=2)], ids=str)
def test_a_plan_with_an_unknown_argument_or_entry_point_is_refused(degrees: Degrees) -> None:
    model = on_meta(FluxTransformer2DModel, FluxTransformerConfig(num_layers=1, num_single_layers=1))
    for arguments, message in (
        (
            (ShardedArgument("predict", "hidden", "image"),),
            "FluxTransformer2DModel.predict.. has no hidden, which its plan shards",
        ),
        (
            (ShardedArgument("forward", "hidden_states", "image"),),
            "FluxTransformer2DModel.forward is not an entry point",
        ),
        ((ShardedArgument("tokens", "hidden_states", "image"),), "FluxTransformer2DModel.tokens is not an entry point"),
    ):
        plan = replace(FLUX_PLAN, token_segments={"image": "sharded"}, sharded_arguments=arguments)
        with pytest.raises(TypeError, match=message):
            parallelize(model, plan, mesh_of_one_rank(degrees), heads=24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_segments": {"text": "sharded", "image": "replicated"}}, r"\['image'\] are not sharded"),
        ({"token_segments": {"text": "sharded"}}, r"\['image'\] are not sharded"),
        (
            {"sharded_arguments": FLUX_PLAN.sharded_arguments[-1:]},
            r"\['text'\] are sharded, but not in sharded_arguments",
        ),
        ({"gathered_results": (GatheredResult("predict", "video"),)}, r"\['video'\] are not sharded"),
        ({"unquantized": ("proj_out",)}, r"\['proj_out'\] are neither column nor row layers"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FLUX_PLAN, **changes)


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("blocks.0.attn.to_q", "blocks.*.attn.to_[qkv]", True),
        ("blocks.0.attn.to_out", "blocks.*.attn.to_[qkv]", False),
        ("blocks.0.attn", "blocks.*", False),
        ("single_blocks.0", "blocks.*", False),
        ("", "", True),
    ],
)
def test_patterns_match_paths(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


def test_each_rank_reads_only_its_shards(dev: Pair, caplog: pytest.LogCaptureFixture) -> None:
    model = dev.ours.model
    config = FluxPipelineConfig.from_checkpoint(model.checkpoint)
    caplog.set_level(logging.INFO, "models.weights")
    for index in range(4):
        runtime = Runtime(mesh=mesh_of_one_rank(Degrees(tp=4), tp=index))
        transformer = load_module(model.checkpoint, "transformer", config, runtime)
        loaded_bytes = sum(value.nbytes for value in transformer.parameters())
        assert caplog.messages[-1].startswith(f"weights read module=transformer gigabytes={loaded_bytes / 1e9:.6g} ")


@pytest.mark.parametrize("degrees", [Degrees(tp=3), Degrees(tp=2, ulysses=4)], ids=str)
def test_an_indivisible_head_count_is_refused(dev: Pair, degrees: Degrees) -> None:
    model = dev.ours.model
    spec = model.service("denoising")
    with pytest.raises(InvalidInput, match="is not a divisor of the model's 4 attention heads"):
        load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32, mesh=mesh_of_one_rank(degrees)))


@pytest.mark.parametrize("degrees", [Degrees(ring=2), Degrees(cfg=2)], ids=str)
def test_a_family_without_a_plan_is_refused(tmp_path: Path, degrees: Degrees) -> None:
    with toy_family(tmp_path / "plugins") as plugins:
        model = open_model(str(build_toy_checkpoint(tmp_path / "toy")), load_registry([plugins]))
        spec = model.service("denoising")
        load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32, mesh=mesh_of_one_rank(Degrees())))
        with pytest.raises(
            InvalidInput,
            match=f"degrees: {degrees} are not supported, as ToyPipeline has no parallel plan",
        ):
            load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32, mesh=mesh_of_one_rank(degrees)))


def test_the_numerics_fingerprint_differs_between_layouts() -> None:
    fingerprints = {
        numerics_fingerprint(CPU, torch.float32, degrees) for degrees in (Degrees(tp=2), Degrees(ring=2), None)
    }
    assert len(fingerprints) == 3
    assert numerics_fingerprint(CPU, torch.float32, Degrees()) == numerics_fingerprint(CPU, torch.float32)
    assert numerics_fingerprint(CPU, torch.float32, Degrees(ring=2), shares_memory=True) not in fingerprints
