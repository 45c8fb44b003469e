"""Requests of small random models of every family, to compare worker groups with one rank.

Sequence lengths have few divisors. Ranks come from a RankPool, on the CPU or on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.artifacts import Canvas, Conditioning, LatentPart, Latents, ParamValue, Sampling
from common.checkpoint import Checkpoint
from common.stage import Call
from configs.pipeline_configs.dmd import CausalDmdConfig
from denoising_files import save_input
from local_fleet import relative_error
from models.contracts import DenoisingInput, LatentPreparationInput, TimestepPreparationInput
from models.loader import load_module
from models.parallel.mesh import Degrees
from models.runtime import Runtime
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage
from rank_calls import denoise, forward, open_with, rank_file
from rank_pool import RankPool
from tiny_flux import LATENT_CHANNELS, build_tiny_flux
from tiny_flux2 import LATENT_CHANNELS as FLUX2_CHANNELS
from tiny_flux2 import TEXT_SIZE as FLUX2_TEXT_SIZE
from tiny_flux2 import build_tiny_flux2_dev, build_tiny_flux2_klein
from tiny_glm_image import CODES, GLYPH_SIZE, build_tiny_glm_image
from tiny_hunyuan_video import LATENT_CHANNELS as HUNYUAN_CHANNELS
from tiny_hunyuan_video import POOLED_SIZE, build_tiny_hunyuan_video
from tiny_ltx2 import AUDIO_SIZE, VIDEO_CHANNELS, VIDEO_SIZE, build_tiny_ltx2
from tiny_ltx_video import CAPTION_SIZE as LTX_CAPTION_SIZE
from tiny_ltx_video import CHANNELS as LTX_CHANNELS
from tiny_ltx_video import build_tiny_ltx_video
from tiny_qwen_image import (
    build_tiny_qwen_image,
    build_tiny_qwen_image_edit,
    build_tiny_qwen_image_edit_plus,
    build_tiny_qwen_image_layered,
)
from tiny_wan import (
    TI2V_LATENT_CHANNELS,
    build_tiny_wan,
    build_tiny_wan_a14b,
    build_tiny_wan_causal,
    build_tiny_wan_dmd,
    build_tiny_wan_i2v,
    build_tiny_wan_ti2v,
)
from tiny_z_image import TEXT_SIZE, build_tiny_z_image

CPU = torch.device("cpu")
STEPS = 4

# All layouts of up to four ranks.
LAYOUTS = [
    Degrees(tp, ulysses, ring, cfg)
    for tp, ulysses, ring, cfg in product((1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2))
    if tp * ulysses * ring * cfg <= 4
]


@dataclass(frozen=True)
class Family:
    """A checkpoint, and a request whose token count has few divisors.

    Shapes of embeddings are (tokens, width) or (width,); `ids` are shapes (tokens,) of token ids for both branches.
    Image conditions are (packed shape, raw shape). `channels` is the number of latent channels; a token is a patch of
    `patch` latents. `config` is a reference "module:Class", if it differs from the registered config. With
    `uses_generator`, the loop receives the noise generator.
    """

    build: Callable[[Path], Path]
    canvas: Canvas
    tokens: int
    positive: Mapping[str, tuple[int, ...]]
    negative: Mapping[str, tuple[int, ...]]
    image_embeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    condition: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    more_conditions: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    channels: int = LATENT_CHANNELS
    patch: int = 4
    config: str = ""
    sampling: Sampling | None = None
    uses_generator: bool = False


PARAMS: Mapping[str, ParamValue] = {
    "audio_guidance_scale": 3.0,
    "stg_scale": 1.0,
    "audio_stg_scale": 0.5,
    "spatio_temporal_guidance_blocks": (1.0,),
    "modality_scale": 2.0,
    "audio_modality_scale": 3.0,
    "guidance_rescale": 0.7,
    "audio_guidance_rescale": 0.4,
    "cfg_truncation": 0.15,
    "cfg_normalization": 1.0,
}
"""Parameters of LTX-2, then of Z-Image, whose guidance ends after the second step."""
SAMPLING = Sampling(
    num_inference_steps=STEPS,
    seed=3,
    num_outputs_per_prompt=2,
    guidance_scale=4.0,
    true_cfg_scale=2.0,
    params={**PARAMS, "guidance_scale_2": 3.0},
)
DMD = Sampling(
    num_inference_steps=3,
    seed=3,
    num_outputs_per_prompt=2,
    params={"dmd_denoising_steps": (1000.0, 757.0, 522.0), "flow_shift": 8.0},
)
FAMILIES = {
    "flux": Family(
        build_tiny_flux,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, 32), "pooled_projections": (24,)},
        negative={"encoder_hidden_states": (11, 32), "pooled_projections": (24,)},
        tokens=35,
    ),
    # Reference images of 15 and 8 tokens.
    "flux2-klein": Family(
        build_tiny_flux2_klein,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, FLUX2_TEXT_SIZE)},
        negative={"encoder_hidden_states": (13, FLUX2_TEXT_SIZE)},
        condition=((1, 15, 4 * FLUX2_CHANNELS), (1, 4 * FLUX2_CHANNELS, 3, 5)),
        more_conditions=(((1, 8, 4 * FLUX2_CHANNELS), (1, 4 * FLUX2_CHANNELS, 4, 2)),),
        tokens=35,
        channels=FLUX2_CHANNELS,
        config="configs.pipeline_configs.flux2_klein:Flux2KleinImagePipelineConfig",
    ),
    "flux2-dev": Family(
        build_tiny_flux2_dev,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, FLUX2_TEXT_SIZE)},
        negative={},
        tokens=35,
        channels=FLUX2_CHANNELS,
        config="configs.pipeline_configs.flux2_dev:Flux2PipelineConfig",
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
    # Input images of 15 and 8 tokens, with a separate timestep.
    "qwen-image-edit-plus": Family(
        build_tiny_qwen_image_edit_plus,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (6, 32)},
        condition=((1, 15, 64), (1, 1, 16, 6, 10)),
        more_conditions=(((1, 8, 64), (1, 1, 16, 8, 4)),),
        tokens=35,
    ),
    # Two layers, the composite and the input image, of 15 tokens each.
    "qwen-image-layered": Family(
        build_tiny_qwen_image_layered,
        Canvas(height=48, width=80, num_frames=2),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (6, 32)},
        condition=((1, 15, 64), (1, 1, 16, 6, 10)),
        tokens=45,
    ),
    "wan": Family(
        build_tiny_wan,
        Canvas(height=80, width=112, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        tokens=35,
    ),
    "wan-dmd": Family(
        build_tiny_wan_dmd,
        Canvas(height=80, width=112, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={},
        tokens=35,
        sampling=DMD,
        uses_generator=True,
    ),
    # Two blocks of 30 tokens.
    "wan-causal": Family(
        build_tiny_wan_causal,
        Canvas(height=48, width=80, num_frames=13, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={},
        tokens=60,
        sampling=DMD,
        uses_generator=True,
    ),
    "wan-i2v": Family(
        build_tiny_wan_i2v,
        Canvas(height=48, width=80, num_frames=9, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        image_embeds={"encoder_hidden_states_image": (17, 24)},
        condition=((1, 20, 3, 6, 10), (1, 20, 3, 6, 10)),
        tokens=45,
    ),
    # Two steps of transformer, two of transformer_2.
    "wan-a14b": Family(
        build_tiny_wan_a14b,
        Canvas(height=80, width=112, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        tokens=35,
    ),
    "glm-image": Family(
        build_tiny_glm_image,
        Canvas(height=96, width=160),
        positive={"encoder_hidden_states": (13, GLYPH_SIZE)},
        negative={"encoder_hidden_states": (1, GLYPH_SIZE)},
        ids={"prior_token_id": (60,)},
        tokens=60,
    ),
    "hunyuan-video": Family(
        build_tiny_hunyuan_video,
        Canvas(height=48, width=80, num_frames=9, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32), "pooled_projections": (POOLED_SIZE,)},
        negative={"encoder_hidden_states": (1, 32), "pooled_projections": (POOLED_SIZE,)},
        tokens=45,
        channels=HUNYUAN_CHANNELS,
    ),
    # The text is padded to 64 or 32 tokens, the image to 64.
    "z-image": Family(
        build_tiny_z_image,
        Canvas(height=80, width=112),
        positive={"encoder_hidden_states": (40, TEXT_SIZE)},
        negative={"encoder_hidden_states": (3, TEXT_SIZE)},
        tokens=35,
    ),
    # 15 tokens of the input first frame, and 45 other video tokens.
    "wan-ti2v": Family(
        build_tiny_wan_ti2v,
        Canvas(height=96, width=160, num_frames=13, output_format="mp4"),
        positive={"encoder_hidden_states": (13, 32)},
        negative={"encoder_hidden_states": (13, 32)},
        condition=((1, TI2V_LATENT_CHANNELS, 1, 6, 10), (1, TI2V_LATENT_CHANNELS, 1, 6, 10)),
        tokens=60,
        channels=TI2V_LATENT_CHANNELS,
        config="configs.pipeline_configs.wan_ti2v:WanTI2VImagePipelineConfig",
    ),
    # The same tokens as wan-ti2v, but packed.
    "ltx-video": Family(
        build_tiny_ltx_video,
        Canvas(height=96, width=160, num_frames=25, output_format="mp4"),
        positive={"encoder_hidden_states": (13, LTX_CAPTION_SIZE)},
        negative={"encoder_hidden_states": (1, LTX_CAPTION_SIZE)},
        condition=((1, 15, LTX_CHANNELS), (1, LTX_CHANNELS, 1, 3, 5)),
        tokens=60,
        channels=LTX_CHANNELS,
        patch=1,
        config="configs.pipeline_configs.ltx_video:LTXVideoImageToVideoPipelineConfig",
    ),
    # 15 tokens of the input first frame, 45 other video tokens, and 52 audio tokens.
    "ltx2": Family(
        build_tiny_ltx2,
        Canvas(height=96, width=160, num_frames=25, frame_rate=12.0, output_format="mp4"),
        positive={"encoder_hidden_states": (13, VIDEO_SIZE), "audio_encoder_hidden_states": (13, AUDIO_SIZE)},
        negative={"encoder_hidden_states": (13, VIDEO_SIZE), "audio_encoder_hidden_states": (13, AUDIO_SIZE)},
        condition=((1, VIDEO_CHANNELS, 1, 3, 5), (1, VIDEO_CHANNELS, 1, 3, 5)),
        tokens=60,
        channels=VIDEO_CHANNELS,
        patch=1,
        config="configs.pipeline_configs.ltx2:LTX2ImageToVideoPipelineConfig",
    ),
}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, its inputs for the loop and for one prediction, and one rank's results."""

    model: Mapping[str, str]
    loop: Path
    single: Path
    steps: list[int]
    latents: Tensor
    prediction: Tensor

    @property
    def checkpoint(self) -> str:
        """The checkpoint's directory."""
        return self.model["checkpoint"]


Run = Callable[..., object]
"""Calls a function of rank_calls with keyword arguments, on one rank."""


def alone(function: Callable[..., object], **keywords: Any) -> object:
    """Call a function of rank_calls in this process, on the CPU."""
    return function(0, **keywords)


def make_case(family: Family, folder: Path, run: Run = alone) -> Case:
    """Draw a random request and run it on one rank."""
    model = {"checkpoint": str(family.build(folder / "checkpoint")), "config": family.config}
    checkpoint, config = open_with(**model)
    x = draw_input(checkpoint, config, family)
    save_input(x, folder / "loop.safetensors")
    save_file(single_input(config, x), folder / "single.safetensors")
    made: dict[str, Tensor] = {}
    for function, file in ((denoise, "loop"), (forward, "single")):
        inputs = str(folder / f"{file}.safetensors")
        run(function, **model, inputs=inputs, output=str(folder / file))
        made |= load_file(rank_file(str(folder / file), 0))
    blocks = config.blocks_of(x.initial_latents.parts["video"].latents) if isinstance(config, CausalDmdConfig) else 1
    steps = [*range(1, blocks * x.schedule.num_inference_steps + 1)]
    return Case(model, folder / "loop.safetensors", folder / "single.safetensors", steps, **made)


def draw_input(checkpoint: Checkpoint, config: Any, family: Family) -> DenoisingInput:
    """Draw the loop's input: noise and schedule from the family's stages, random encoder outputs."""
    torch.manual_seed(5)
    runtime, canvas, sampling = Runtime(), family.canvas, family.sampling or SAMPLING
    scheduler = load_module(checkpoint, "scheduler", config, runtime)
    drawing = LatentPreparationInput(canvas=canvas, sampling=sampling)
    initial = LatentPreparationStage(config, runtime, {}).run(drawing, Call("test"))
    timesteps = TimestepPreparationStage(config, runtime, {"scheduler": scheduler})
    noise = next(iter(initial.initial_latents.parts.values()))
    assert noise.latents[0].numel() == family.tokens * family.patch * family.channels
    ids = {name: torch.randint(CODES, (1, *size)) for name, size in family.ids.items()}
    parts = {}
    for index, (packed, raw) in enumerate((family.condition, *family.more_conditions) if family.condition else ()):
        name = f"condition_{index}" if index else "condition"
        parts[name] = LatentPart(latents=torch.randn(packed), raw_latent_shape=raw)
    condition = Latents(parts=parts) if parts else None
    return DenoisingInput(
        initial_latents=initial.initial_latents,
        schedule=timesteps.run(TimestepPreparationInput(canvas=canvas, sampling=sampling), Call("test")).schedule,
        text_conditioning=Conditioning(
            prompt_embeds=draw(family.positive) | ids,
            negative_prompt_embeds=draw(family.negative) | {name: each.clone() for name, each in ids.items()},
        ),
        image_conditioning=Conditioning(prompt_embeds=draw(family.image_embeds)) if family.image_embeds else None,
        image_latents=condition,
        sampling=sampling,
        latents_generator=initial.latents_generator if family.uses_generator else None,
    )


def draw(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(1, *size) for name, size in sizes.items()}


def single_input(config: Any, x: DenoisingInput) -> dict[str, Tensor]:
    """Arguments of one prediction in the middle of the schedule, for the first output."""
    noise = x.initial_latents.parts
    given = x.image_latents.parts if x.image_latents else {}
    conditions = {name: each.latents for name, each in given.items()}
    embeds = {**x.text_conditioning.prompt_embeds}
    shapes = {name: each.raw_latent_shape for name, each in given.items()}
    shapes |= {part: (1, *each.raw_latent_shape[1:]) for part, each in noise.items()}
    latents = config.model_input({part: each.latents[:1] for part, each in noise.items()}, conditions)
    keywords = {
        **embeds,
        **(x.image_conditioning.prompt_embeds if x.image_conditioning else {}),
        **config.prepare_pos_cond_kwargs(embeds, shapes, x.sampling),
        **{{**config.part_keywords, **config.condition_keywords}[part]: each for part, each in latents.items()},
        "timestep": config.model_timestep(x.schedule.timesteps[1:2]),
    }
    return {name: value.contiguous() for name, value in keywords.items() if value is not None}


def check(pool: RankPool, case: Case, degrees: Degrees, folder: Path) -> dict[str, float]:
    """Compare prediction and loop of every rank with one rank's results; returns the relative L2 errors."""
    errors = {}
    pool.join(degrees)
    single = {**case.model, "inputs": str(case.single), "output": str(folder / "single")}
    loop = {**case.model, "inputs": str(case.loop), "output": str(folder / "loop")}
    pool.call("rank_calls:forward", **single)
    assert pool.call("rank_calls:denoise", **loop) == [case.steps] * degrees.world_size
    for name, expected, most in (("single", case.prediction, 1e-5), ("loop", case.latents, 1e-4)):
        results = [load_file(rank_file(str(folder / name), rank)) for rank in range(degrees.world_size)]
        (got, *others) = [tensor for result in results for tensor in result.values()]
        errors[name] = relative_error(got, expected)
        assert errors[name] <= most, name
        assert all(torch.equal(got, other) for other in others), f"{name}: ranks disagree"
        if degrees.world_size == degrees.cfg:
            assert torch.equal(got, expected), f"{name}: cfg alone changes no shape, so no rounding"
    return errors
