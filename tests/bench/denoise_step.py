"""One denoising step at published size: ours compared with eager and compiled Diffusers.

Both sides have the same weights, random bfloat16 values. Sides alternate and are timed with CUDA events, so that both
run at the same GPU temperature. Ours runs as in the denoising stage: the request is prepared once, which is reported
separately, then each step replays a CUDA graph. Errors are relative L2 against Diffusers' model in float32. Memory
excludes the weights.

Run it with: python tests/bench/denoise_step.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, milliseconds, now
from bench_inputs import Inputs
from bench_report import median, print_machine, print_table, say
from bench_steps import RequestSteps, new_pool
from bench_weights import build_reference, on, same_weights
from bench_works import WORKS, Work
from torch import Tensor, nn

from models.dits.base import DiffusionTransformer, Predictions
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights, quantize_linears
from models.stages.predictor import StepCaching
from models.warm_up import STEPS as WARM_UP_STEPS

STEPS = 28


def main() -> None:
    """Measure the selected workloads and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=tuple(WORKS), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of five steps")
    parser.add_argument("--compile", action="store_true", help="also time Diffusers with compiled repeated blocks")
    parser.add_argument(
        "--linear-dtype", choices=("same", "float8"), default="same", help="float8: also time ours in float8"
    )
    parser.add_argument("--step-cache", type=float, help="also run a loop whose step cache has this threshold")
    parser.add_argument("--profile", type=Path, help="folder for files with our kernel times")
    args = parser.parse_args()
    device = torch.device(args.device)
    try_packages(device)
    print_machine(f"A denoising step on {args.device}: ours and Diffusers")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
        say()
    for name in args.work:
        measure(WORKS[name], device, args)
        empty(device)


@torch.inference_mode()
def measure(work: Work, device: torch.device, args: argparse.Namespace) -> None:
    """Build both sides, compare their results, time them alternately, and print a table."""
    tiny = args.scale == "tiny"
    theirs = build_reference(work, device, tiny=tiny)
    ours = same_weights(work, theirs)
    their_inputs, our_inputs = (on(device, given) for given in work.inputs(tiny))
    exact = float32_predictions(theirs, their_inputs)
    join_all_weights(ours)
    latents, timestep = {name: our_inputs.pop(name) for name in work.latents}, our_inputs.pop("timestep")
    timesteps = timestep[None].expand(STEPS, *timestep.shape)
    print_first_requests(ours, latents, timesteps, our_inputs)

    def side(model: DiffusionTransformer, caching: StepCaching | None = None) -> Callable[[], tuple[Tensor, ...]]:
        step = step_of(model, latents, timesteps, our_inputs, caching)
        return lambda: work.parts(step())

    sides: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "Diffusers": lambda: theirs(**their_inputs, return_dict=False),
        "ours": side(ours),
    }
    if args.linear_dtype == "float8":
        quantized = same_weights(work, theirs)
        quantize_linears(quantized, work.plan.block_linears)
        sides["ours, float8"] = side(quantized)
    if args.step_cache is not None:
        # The inputs never change: a threshold above 0 reuses all steps but the first, a negative threshold no step.
        for name, threshold in (("ours, reused", 1.0), ("ours, probed and computed", -1.0)):
            sides[name] = side(ours, StepCaching(threshold))
    errors = {name: largest_error(run(), exact) for name, run in sides.items()}
    peaks = {name: peak_beside(run, device) for name, run in sides.items()}
    if args.compile:
        began = time.perf_counter()
        theirs.compile_repeated_blocks(fullgraph=True)
        sides["Diffusers, compiled"] = sides.pop("Diffusers")
        errors["Diffusers, compiled"] = largest_error(sides["Diffusers, compiled"](), exact)
        say(f"Diffusers compiled in {time.perf_counter() - began:.0f} s")
    spent = in_turns(sides, partial(step_milliseconds, device=device), args.repeats)
    once = 1e3 * timed(lambda: ours.prepare(timesteps, **our_inputs), device)
    say(f"## {work.title}{' (tiny)' if tiny else ''}")
    say()
    print_table(
        ("", "ms per step", "fastest", "error", "MB without weights"),
        [
            (name, median(spent[name]), min(spent[name]), f"{errors[name]:.2e}", peaks.get(name, float("nan")))
            for name in spent
        ],
    )
    say(f"Ours prepares a request of {STEPS} steps in {once:.1f} ms, which is {once / STEPS:.2f} ms per step")
    for name in spent:
        if name.startswith("Diffusers"):
            goal = f"; goal {work.goal_ms} ms" if work.goal_ms else ""
            say(f"Ours takes {median(spent['ours']) / median(spent[name]):.2f} times as long as {name}{goal}")
        elif name != "ours":
            say(f"{name} takes {median(spent[name]) / median(spent['ours']):.2f} times as long as ours")
    if args.step_cache is not None:
        print_cached_loop(ours, latents, timestep, our_inputs, args.step_cache)
    say()
    for name, run in sides.items() if args.profile else ():
        if name.startswith("ours"):
            profile(run, args.profile / f"{work.reference.__name__} {name}.txt")


def step_of(
    ours: DiffusionTransformer,
    latents: Mapping[str, Tensor],
    timesteps: Tensor,
    inputs: Inputs,
    caching: StepCaching | None = None,
) -> Callable[[], Predictions]:
    """One step of ours, as the denoising stage runs it."""
    steps = RequestSteps(new_pool(timesteps.device), ours, timesteps, inputs, latents, caching)
    return lambda: steps.predict_parts(latents, 0)


def print_cached_loop(
    ours: DiffusionTransformer, noise: Mapping[str, Tensor], timestep: Tensor, inputs: Inputs, threshold: float
) -> None:
    """Run an Euler loop over evenly spaced steps with and without a step cache, twice each.

    Latents without a prediction, and timesteps of 0, belong to input images and are not updated.
    """
    device = timestep.device
    sigmas = torch.linspace(1, 0, STEPS + 1, device=device)
    whole = (1000 if timestep.max() > 1 else 1) * (timestep > 0)
    timesteps = (sigmas[:-1].view(-1, *(1 for _ in timestep.shape)) * whole).to(timestep.dtype)
    made, spent, reused = [], [], 0
    for caching in (None, StepCaching(threshold)):
        pool = new_pool(device)
        for _ in range(2):
            with RequestSteps(pool, ours, timesteps, inputs, noise, caching) as steps:
                latents, began = dict(noise), now(device)
                for step in range(STEPS):
                    for name, velocity in steps.predict_parts(latents, step).items():
                        change = (sigmas[step + 1] - sigmas[step]) * velocity
                        latents[name] = latents[name] + change.to(velocity.dtype)
                took, reused = now(device) - began, steps.reused
        made.append(tuple(each.double() for each in latents.values()))
        spent.append(1e3 * took / STEPS)
    say(
        f"A loop of {STEPS} steps: {spent[0]:.1f} ms per step; {spent[1]:.1f} ms with a step cache (threshold "
        f"{threshold:g}), which reuses {reused} steps; relative L2 error of the latents "
        f"{largest_error(made[1], made[0]):.2e}"
    )


def print_first_requests(
    ours: DiffusionTransformer, latents: Mapping[str, Tensor], timesteps: Tensor, inputs: Inputs
) -> None:
    """Time three steps, including preparation, of the warm-up, the first and the second request."""

    pool = new_pool(timesteps.device)

    def request(prepared_steps: int) -> None:
        with RequestSteps(pool, ours, timesteps[:prepared_steps], inputs, latents) as steps:
            for step in range(WARM_UP_STEPS):
                steps.predict_parts(latents, step)

    spent = [1e3 * timed(partial(request, steps), timesteps.device) for steps in (WARM_UP_STEPS, STEPS, STEPS)]
    say(
        f"{WARM_UP_STEPS} steps with preparation: {spent[0]:.1f} ms in the warm-up, {spent[1]:.1f} ms in the first "
        f"request, {spent[2]:.1f} ms in the second request; first / second: {spent[1] / spent[2]:.2f}"
    )
    say()


def float32_prediction(model: Any, inputs: Inputs) -> Tensor:
    """The reference's first prediction in float32."""
    return float32_predictions(model, inputs)[0]


def float32_predictions(model: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference's predictions in float32. Each module's weights are converted only while it runs."""
    handles = []
    kept: dict[nn.Module, dict[str, Tensor]] = {}

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept[module] = {name: value.data for name, value in module.named_parameters(recurse=False)}
        for value in module.parameters(recurse=False):
            value.data = value.data.float()
        return tuple(map(_widened, inputs))

    def narrow(module: nn.Module, *_: object) -> None:
        for name, value in module.named_parameters(recurse=False):
            value.data = kept[module][name]
        del kept[module]

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
    wide = {name: _widened(value) for name, value in inputs.items()}
    exact = tuple(each.double() for each in model(**wide, return_dict=False))
    for handle in handles:
        handle.remove()
    return exact


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def error(prediction: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return float((prediction.double() - exact).norm() / exact.norm())


def largest_error(predictions: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest relative L2 error of the parts, such as video and audio."""
    return max(error(*pair) for pair in zip(predictions, exact, strict=True))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    began = now(device)
    run()
    return now(device) - began


def peak_beside(run: Callable[[], object], device: torch.device) -> float:
    """Peak MB of a call above the memory in use before; graph memory is counted at its capture."""
    if device.type != "cuda":
        return float("nan")
    empty(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def step_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a call in ms, by CUDA events on a GPU."""
    return milliseconds(run) if device.type == "cuda" else 1e3 * timed(run, device)


def in_turns(
    sides: Mapping[str, Callable[[], object]], clock: Callable[[Callable[[], object]], float], repeats: int
) -> dict[str, list[float]]:
    """Times of each side's calls by `clock`; the sides alternate in every round."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        for _ in range(3):
            run()
    for _ in range(repeats):
        for name, run in sides.items():
            spent[name].append(clock(run))
    return spent


def profile(run: Callable[[], object], path: Path) -> None:
    """Write a table of kernels sorted by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=110))


if __name__ == "__main__":
    main()
