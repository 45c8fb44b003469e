"""A prediction of Qwen-Image-Edit-Plus and of Qwen-Image-Layered on CUDA, next to Diffusers over the same weights.

Random weights of published size in bfloat16: 1024x1024 with two given images of that size, which have a timestep of
their own (2511), and four layers of 640x640. Ours is a CUDA graph a step, as the denoising stage runs it. Errors are
relative L2 against Diffusers' model in float32. Memory is beside the weights, about 41 GB.

Run it with: python tests/bench/cuda_qwen_image_edit.py; to try its logic without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_device import empty
from bench_report import median, print_machine, print_table, say
from bench_steps import HIDDEN_STATES, RequestSteps, new_pool
from bench_works import TINY, Work
from denoise_step import (
    STEPS,
    build_reference,
    error,
    float32_prediction,
    in_turns,
    peak_beside,
    same_weights,
    step_milliseconds,
    timed,
)
from diffusers import QwenImageTransformer2DModel as Reference
from torch import Tensor

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.pipeline_configs.qwen_image import positions
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights

CONDITION_STATES = "condition_states"
TEXT_TOKENS = 200
SIDES = {"full": (64, 40), "tiny": (4, 4)}
"""Tokens along the sides of an edited image, and of a layer."""


@dataclass(frozen=True)
class Tokens:
    """Frames of an output and frames of given images, as positions along the first axis; variants of the DiT."""

    title: str
    flags: Mapping[str, bool]
    made: tuple[int, ...]
    given: tuple[int, ...]


WORKS = {
    "edit-plus": Tokens("Edit-Plus 2511, two given images", {"zero_cond_t": True}, made=(0,), given=(1, 2)),
    "layered": Tokens(
        "Layered, four layers",
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
        made=(0, 1, 2, 3, 4),
        given=(-1,),
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SIDES))
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=tuple(WORKS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of five predictions")
    args = parser.parse_args()
    device = torch.device(args.device)
    try_packages(device)
    print_machine(f"Qwen-Image with given images on {args.device}, ours next to Diffusers")
    for name, side in zip(WORKS, SIDES[args.scale], strict=True):
        if name in args.work:
            measure(WORKS[name], side, device, args)
            empty(device)


@torch.inference_mode()
def measure(tokens: Tokens, side: int, device: torch.device, args: argparse.Namespace) -> None:
    """Build both sides, compare their results, time them alternately, print."""
    work = Work(
        tokens.title,
        Reference,
        {"in_channels": 64, "out_channels": 16, **tokens.flags},
        lambda config: QwenImageTransformer2DModel(QwenImageTransformerConfig.from_dict("transformer", config)),
        lambda tiny: inputs_of(tokens, side, TINY[Reference]["joint_attention_dim"] if tiny else 3584),
        QWEN_IMAGE_PLAN,
    )
    theirs = build_reference(work, device, tiny=args.scale == "tiny")
    ours = same_weights(work, theirs)
    join_all_weights(ours)
    their_inputs, our_inputs = (
        {name: each.to(device) if isinstance(each, Tensor) else each for name, each in given.items()}
        for given in work.inputs(args.scale == "tiny")
    )
    exact = float32_prediction(theirs, their_inputs)[:, : len(tokens.made) * side * side]
    latents = {name: our_inputs.pop(name) for name in (HIDDEN_STATES, CONDITION_STATES)}
    timesteps = our_inputs.pop("timestep")[None].expand(STEPS, -1)
    once = 1e3 * timed(lambda: ours.prepare(timesteps, **our_inputs), device)
    with RequestSteps(new_pool(device), ours, timesteps, our_inputs, latents) as steps:
        sides: dict[str, Callable[[], Tensor]] = {
            "Diffusers": lambda: theirs(**their_inputs, return_dict=False)[0][:, : exact.shape[1]],
            "ours": lambda: steps.predict_parts(latents, 0)[HIDDEN_STATES],
        }
        errors = {name: error(run(), exact) for name, run in sides.items()}
        peaks = {name: peak_beside(run, device) for name, run in sides.items()}
        spent = in_turns(sides, partial(step_milliseconds, device=device), args.repeats)
    say(f"## {tokens.title}, {TEXT_TOKENS} text and {sum(each.shape[1] for each in latents.values())} image tokens")
    say()
    print_table(
        ("one prediction", "ms", "fastest", "error against float32", "MB beside the weights"),
        [(name, median(spent[name]), min(spent[name]), f"{errors[name]:.2e}", peaks[name]) for name in sides],
    )
    say(f"Ours prepares a request of {STEPS} steps in {once:.1f} ms")
    say(f"Ours takes {median(spent['ours']) / median(spent['Diffusers']):.2f} of Diffusers")
    say()


def inputs_of(tokens: Tokens, side: int, width: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Theirs and ours, by the names of forward()."""
    torch.manual_seed(1)
    frames = (tokens.made, tokens.given)
    made, given = (torch.randn(1, len(each) * side * side, 64).bfloat16() for each in frames)
    img_ids, condition_ids = (torch.cat([positions(frame, side, side) for frame in each]) for each in frames)
    shared = {
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, width).bfloat16(),
        "timestep": torch.tensor([0.75]),
    }
    start = max(side // 2, len(tokens.made) if tokens.flags.get("use_layer3d_rope") else 0)
    theirs: dict[str, Any] = {
        **shared,
        "hidden_states": torch.cat((made, given), dim=1),
        "img_shapes": [[(1, side, side)] * (len(tokens.made) + len(tokens.given))],
        "additional_t_cond": torch.zeros(1, dtype=torch.int64),
    }
    ours = {
        **shared,
        HIDDEN_STATES: made,
        CONDITION_STATES: given,
        "img_ids": img_ids,
        "condition_ids": condition_ids,
        "txt_ids": (torch.arange(float(TEXT_TOKENS)) + start)[:, None].expand(-1, 3),
    }
    return theirs, ours


if __name__ == "__main__":
    main()
