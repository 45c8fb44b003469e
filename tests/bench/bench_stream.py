"""Causal Wan with random weights in memory, and timed runs of its denoising and decoding.

Sizes are those of Self Forcing's Wan2.1-T2V-1.3B. Nothing is downloaded or written: weights are drawn on the devices,
noise and text embeddings on the CPU.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from bench_device import default_dtype, now
from diffusers import AutoencoderKLWan

from common.artifacts import Canvas, Conditioning, Latents, MediaItem, Sampling
from common.local import HostedStages, LocalRunner
from common.pipeline import run_pipeline
from common.stage import Call, PipelineStage
from configs.models.dits.causal_wan import CausalWanTransformerConfig
from configs.models.vaes.wan import AutoencoderKLWanConfig
from configs.pipeline_configs.wan_dmd import WanCausalDMDPipelineConfig
from configs.sample.wan_dmd import WanCausalDMDSamplingParams
from models.contracts import LatentPreparationInput, TimestepPreparationInput
from models.dits.causal_wan import CausalWanTransformer3DModel
from models.dits.wan import FLOAT32_PARAMETERS
from models.layers.linear import join_all_weights
from models.runtime import Runtime
from models.stages.causal_dmd_denoising import CausalDMDDenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage
from models.stages.video_decoding import BlockDecodingStage
from models.vaes.wan import WanVAE

DTYPE = torch.bfloat16
BLOCKS, FILES = "denoised_blocks", "media_items"
SEED = 7
FRAME_RATE = 16.0


@dataclass(frozen=True)
class Scale:
    """Module sizes and video size."""

    dit: Mapping[str, Any]
    vae: Mapping[str, Any]
    height: int
    width: int
    frames: int
    text_tokens: int = 512


SCALES = {
    "full": Scale(
        dit={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096, "num_frames_per_block": 3},
        vae={"base_dim": 96},
        height=480,
        width=832,
        frames=81,
    ),
    "tiny": Scale(
        dit={"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 64, "num_frames_per_block": 3},
        vae={"base_dim": 16},
        height=64,
        width=96,
        frames=33,
        text_tokens=16,
    ),
}


class TimedStages(HostedStages):
    """Stages of a device; records emission times by slot, in seconds of time.perf_counter()."""

    def __init__(self, name: str, stages: Sequence[PipelineStage[Any, Any]], device: torch.device) -> None:
        super().__init__(name, stages)
        self._device = device
        self.times: dict[str, list[float]] = {}

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Run the stages and record the times of their items."""
        self.times = {BLOCKS: [], FILES: []}

        def on_item(slot: str, index: int, item: Any) -> None:
            if slot in self.times:
                self.times[slot].append(time.perf_counter())
            call.on_item(slot, index, item)

        with _current(self._device, goes_first=bool(self.contract.input_streams)):
            return super().run(values, replace(call, on_item=on_item))


@contextmanager
def _current(device: torch.device, *, goes_first: bool) -> Iterator[None]:
    """Select the device of this thread, for Triton; with `goes_first`, use a stream of higher priority."""
    if device.type != "cuda":
        yield
        return
    stream: Any = torch.cuda.default_stream(device)
    if goes_first:
        stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


@dataclass(frozen=True)
class CausalWan:
    """The two services, and their inputs for a request."""

    denoising: TimedStages
    decoding: TimedStages
    request: Mapping[str, Any]
    kv_bytes: int


@dataclass(frozen=True)
class Timeline:
    """Times of a run in seconds since its start: emitted blocks, emitted file parts, and the end.

    `frames` are the frame counts of the parts.
    """

    total: float
    blocks: Sequence[float] = ()
    parts: Sequence[float] = ()
    frames: Sequence[int] = ()

    def seconds_to(self, frames: float) -> float:
        """Seconds until the emitted parts have at least `frames` frames."""
        return next(at for at, done in zip(self.parts, accumulate(self.frames), strict=True) if done >= frames)


@dataclass(frozen=True)
class Listed:
    """A stream whose items are all available."""

    items: list[Latents] = field(default_factory=list)
    given: list[int] = field(default_factory=list)

    def __iter__(self) -> Any:
        for index, item in enumerate(self.items):
            self.given.append(index)
            yield item

    def has_next(self) -> bool:
        """Whether there is a next item."""
        return len(self.given) < len(self.items)


def build(scale: Scale, denoiser: torch.device, decoder: torch.device) -> CausalWan:
    """Draw weights on the devices of denoising and decoding, and prepare a request."""
    torch.manual_seed(0)
    with decoder, default_dtype(DTYPE):
        vae = AutoencoderKLWan(**scale.vae).eval().requires_grad_(False)
    config = WanCausalDMDPipelineConfig(
        transformer=CausalWanTransformerConfig.from_dict("transformer", {"attention_head_dim": 128, **scale.dit}),
        vae=AutoencoderKLWanConfig.from_dict("vae", dict(vae.config)),
    )
    transformer, runtime = _transformer(config.transformer, denoiser), Runtime(device=denoiser, dtype=DTYPE)
    denoising = CausalDMDDenoisingStage(config, runtime, {"transformer": transformer})
    decoding = BlockDecodingStage(config, Runtime(device=decoder, dtype=DTYPE), {"vae": WanVAE(vae)})
    request = _request(scale, config, runtime)
    return CausalWan(
        TimedStages("denoising", [denoising], denoiser),
        TimedStages("decoding", [decoding], decoder),
        request,
        _kv_bytes(transformer, request),
    )


def _transformer(config: CausalWanTransformerConfig, device: torch.device) -> CausalWanTransformer3DModel:
    """A DiT with random weights of a scale that gives finite outputs."""
    with torch.device("meta"):
        model = CausalWanTransformer3DModel(config)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        keeps_float32 = any(part in name for part in FLOAT32_PARAMETERS)
        parameter.data = parameter.data.to(torch.float32 if keeps_float32 else DTYPE)
        if parameter.ndim == 1:
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            parameter.data.normal_(std=0.02)
    model.requires_grad_(False).eval()
    join_all_weights(model)
    return model


def _request(scale: Scale, config: WanCausalDMDPipelineConfig, runtime: Runtime) -> dict[str, Any]:
    params = WanCausalDMDSamplingParams(
        prompt="",
        seed=SEED,
        height=scale.height,
        width=scale.width,
        num_frames=scale.frames,
        frame_rate=FRAME_RATE,
        output_format="mp4",
    )
    artifacts, call = params.artifacts(), Call("bench")
    canvas, sampling = artifacts["canvas"], artifacts["sampling"]
    assert isinstance(canvas, Canvas), "artifacts() has one artifact per slot"
    assert isinstance(sampling, Sampling), "artifacts() has one artifact per slot"
    drawn = LatentPreparationStage(config, runtime, {}).run(
        LatentPreparationInput(canvas=canvas, sampling=sampling), call
    )
    timesteps = TimestepPreparationInput(canvas=canvas, sampling=sampling)
    text = torch.randn(1, scale.text_tokens, config.transformer.text_dim, dtype=DTYPE)
    return {
        "canvas": canvas,
        "sampling": sampling,
        "initial_latents": drawn.initial_latents,
        "latents_generator": drawn.latents_generator,
        "schedule": TimestepPreparationStage(config, runtime, {}).run(timesteps, call).schedule,
        "text_conditioning": Conditioning(prompt_embeds={"encoder_hidden_states": text}),
    }


def _kv_bytes(transformer: CausalWanTransformer3DModel, request: Mapping[str, Any]) -> int:
    """Bytes of the KV cache of one request."""
    latents, text = request["initial_latents"].parts["video"].latents, request["text_conditioning"].prompt_embeds
    parameter = next(transformer.parameters())
    with torch.inference_mode():
        prepared = transformer.prepare(
            torch.zeros(1, 1, device=parameter.device),
            text["encoder_hidden_states"].to(parameter.device),
            torch.empty(1, 0, *latents.shape[2:]),
        )
    return prepared.memory["kv_cache"].byte_size


def denoise(wan: CausalWan) -> tuple[Timeline, list[Latents]]:
    """Run only denoising."""
    blocks: list[Latents] = []

    def take(slot: str, index: int, item: Any) -> None:
        del index
        if slot == BLOCKS:
            blocks.append(item)

    began = time.perf_counter()
    wan.denoising.run(_inputs(wan.denoising, wan.request), Call("bench", on_item=take))
    total = time.perf_counter() - began
    return Timeline(total, blocks=[at - began for at in wan.denoising.times[BLOCKS]]), blocks


def decode(wan: CausalWan, blocks: Sequence[Latents]) -> Timeline:
    """Run only decoding, with all blocks available."""
    items: list[MediaItem] = []
    began = time.perf_counter()
    given = {"denoised_blocks": Listed(list(blocks)), "canvas": wan.request["canvas"]}
    wan.decoding.run(given, Call("bench", on_item=lambda _, __, item: items.append(item)))
    return _timeline(wan, began, items)


def stream(wan: CausalWan) -> Timeline:
    """Run denoising and decoding concurrently, as a pipeline does."""
    with ThreadPoolExecutor(1) as executor:
        runners = [LocalRunner(stages, executor) for stages in (wan.denoising, wan.decoding)]
        began = time.perf_counter()
        made = asyncio.run(run_pipeline(runners, wan.request, Call("bench"), wanted=(FILES,)))
    return _timeline(wan, began, made[FILES])


def _timeline(wan: CausalWan, began: float, items: Sequence[MediaItem]) -> Timeline:
    return Timeline(
        time.perf_counter() - began,
        blocks=[at - began for at in wan.denoising.times.get(BLOCKS, ())],
        parts=[at - began for at in wan.decoding.times[FILES]],
        frames=[item.num_frames for item in items],
    )


def _inputs(stages: HostedStages, values: Mapping[str, Any]) -> dict[str, Any]:
    return {slot: values[slot] for slot in stages.contract.inputs if slot in values}


def peak_bytes(device: torch.device, run: Any) -> float:
    """Peak bytes of a run above the memory in use before, such as the weights; NaN without a GPU."""
    if device.type != "cuda":
        run()
        return math.nan
    now(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return float(torch.cuda.max_memory_allocated(device) - before)
