"""One denoising step of full published size: ours next to Diffusers, eager and compiled, over the very same weights.

Weights are random, in bfloat16. Every side is timed with the device's own clock, in turns, so that the card is as hot
for one as for the other. Ours is what the denoising stage runs: the request's preparation once, which is told apart,
then a CUDA graph a step. Errors are relative L2 against Diffusers' model in float32. Memory is beside the weights.

Run it with: python tests/bench/denoise_step.py; to try its logic without a card: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, milliseconds, now
from bench_report import median, print_machine, print_table, say
from bench_steps import HIDDEN_STATES, RequestSteps, new_pool
from bench_works import TINY, WORKS, Inputs, Work
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from models.dits.base import DiffusionTransformer
from models.dits.wan import FLOAT32_PARAMETERS
from models.kernels.trials import try_packages
from models.layers.linear import absent_biases, join_all_weights, quantize_linears
from models.parallel.mesh import WorkerMesh
from models.parallel.parallelize import parallelize
from models.parallel.shards import parameter_shards
from models.stages.predictor import StepCaching
from models.warm_up import STEPS as WARM_UP_STEPS

STEPS = 28


def main() -> None:
    """Measure what was asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=tuple(WORKS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of five steps")
    parser.add_argument("--compile", action="store_true", help="time Diffusers compiled by repeated blocks, too")
    parser.add_argument("--linear-dtype", choices=("same", "float8"), default="same", help="time ours in float8, too")
    parser.add_argument("--step-cache", type=float, help="run a loop with a step cache of this threshold, too")
    parser.add_argument("--profile", type=Path, help="folder for a table of our kernels' times")
    args = parser.parse_args()
    device = torch.device(args.device)
    try_packages(device)
    print_machine(f"A denoising step on {args.device}, ours next to Diffusers")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
        say()
    for name in args.work:
        measure(WORKS[name], device, args)
        empty(device)


@torch.inference_mode()
def measure(work: Work, device: torch.device, args: argparse.Namespace) -> None:
    """Build both sides, compare their results, time them alternately, print."""
    tiny = args.scale == "tiny"
    theirs = build_reference(work, device, tiny=tiny)
    ours = same_weights(work, theirs)
    their_inputs, our_inputs = (on(device, given) for given in work.inputs(tiny))
    exact = float32_prediction(theirs, their_inputs)
    join_all_weights(ours)
    hidden_states, timestep = our_inputs.pop("hidden_states"), our_inputs.pop("timestep")
    timesteps = timestep[None].expand(STEPS, -1)
    print_first_requests(ours, hidden_states, timesteps, our_inputs)
    sides: dict[str, Callable[[], Tensor]] = {
        "Diffusers": lambda: theirs(**their_inputs, return_dict=False)[0],
        "ours": step_of(ours, hidden_states, timesteps, our_inputs),
    }
    if args.linear_dtype == "float8":
        quantised = same_weights(work, theirs)
        quantize_linears(quantised, work.plan.block_linears)
        sides["ours, float8"] = step_of(quantised, hidden_states, timesteps, our_inputs)
    if args.step_cache is not None:
        # The inputs never change: with a threshold above 0 all steps but the first are reused, below it none are.
        for name, threshold in (("ours, reused", 1.0), ("ours, probed and computed", -1.0)):
            sides[name] = step_of(ours, hidden_states, timesteps, our_inputs, StepCaching(threshold))
    errors = {name: error(run(), exact) for name, run in sides.items()}
    peaks = {name: peak_beside(run, device) for name, run in sides.items()}
    if args.compile:
        began = time.perf_counter()
        theirs.compile_repeated_blocks(fullgraph=True)
        sides["Diffusers, compiled"] = sides.pop("Diffusers")
        errors["Diffusers, compiled"] = error(sides["Diffusers, compiled"](), exact)
        say(f"Diffusers compiled in {time.perf_counter() - began:.0f} s")
    spent = in_turns(sides, partial(step_milliseconds, device=device), args.repeats)
    once = 1e3 * timed(lambda: ours.prepare(timesteps, **our_inputs), device)
    say(f"## {work.title}{' (tiny)' if tiny else ''}")
    say()
    print_table(
        ("", "ms a step", "fastest", "error", "MB beside the weights"),
        [
            (name, median(spent[name]), min(spent[name]), f"{errors[name]:.2e}", peaks.get(name, float("nan")))
            for name in spent
        ],
    )
    say(f"Ours prepares a request of {STEPS} steps in {once:.1f} ms, {once / STEPS:.2f} ms a step")
    for name in spent:
        if name.startswith("Diffusers"):
            goal = f"; goal {work.goal_ms} ms" if work.goal_ms else ""
            say(f"Ours takes {median(spent['ours']) / median(spent[name]):.2f} of {name}{goal}")
        elif name != "ours":
            say(f"{name} takes {median(spent[name]) / median(spent['ours']):.2f} of ours")
    if args.step_cache is not None:
        print_cached_loop(ours, hidden_states, timestep, our_inputs, args.step_cache)
    say()
    for name, run in sides.items() if args.profile else ():
        if name.startswith("ours"):
            profile(run, args.profile / f"{work.reference.__name__} {name}.txt")


def step_of(
    ours: DiffusionTransformer,
    hidden_states: Tensor,
    timesteps: Tensor,
    inputs: Inputs,
    caching: StepCaching | None = None,
) -> Callable[[], Tensor]:
    """A step of ours, as the denoising stage runs it."""
    steps = RequestSteps(
        new_pool(hidden_states.device), ours, timesteps, inputs, {HIDDEN_STATES: hidden_states}, caching
    )
    return lambda: steps.predict(hidden_states, 0)


def print_cached_loop(
    ours: DiffusionTransformer, noise: Tensor, timestep: Tensor, inputs: Inputs, threshold: float
) -> None:
    """Euler's loop from noise over evenly spaced steps, with a step cache and without; each is run twice."""
    sigmas = torch.linspace(1, 0, STEPS + 1, device=noise.device)
    whole = 1000 if timestep.item() > 1 else 1
    timesteps = (sigmas[:-1, None] * whole).to(timestep.dtype).expand(-1, len(noise))
    made, spent, reused = [], [], 0
    for caching in (None, StepCaching(threshold)):
        pool = new_pool(noise.device)
        for _ in range(2):
            with RequestSteps(pool, ours, timesteps, inputs, {HIDDEN_STATES: noise}, caching) as steps:
                latents, began = noise, now(noise.device)
                for step in range(STEPS):
                    velocity = steps.predict(latents, step)
                    latents = latents + ((sigmas[step + 1] - sigmas[step]) * velocity).to(latents.dtype)
                took, reused = now(noise.device) - began, steps.reused
        made.append(latents.double())
        spent.append(1e3 * took / STEPS)
    say(
        f"A loop of {STEPS} steps: {spent[0]:.1f} ms a step, and {spent[1]:.1f} ms with a step cache of {threshold:g}, "
        f"which reuses {reused} steps; relative L2 of its latents {error(made[1], made[0]):.2e}"
    )


def print_first_requests(ours: DiffusionTransformer, hidden_states: Tensor, timesteps: Tensor, inputs: Inputs) -> None:
    """Three requests of three steps each, with what a service does before them: the warm-up, the first, the second."""

    pool = new_pool(hidden_states.device)

    def request(prepared_steps: int) -> None:
        with RequestSteps(pool, ours, timesteps[:prepared_steps], inputs, {HIDDEN_STATES: hidden_states}) as steps:
            for step in range(WARM_UP_STEPS):
                steps.predict(hidden_states, step)

    spent = [1e3 * timed(partial(request, steps), hidden_states.device) for steps in (WARM_UP_STEPS, STEPS, STEPS)]
    say(
        f"{WARM_UP_STEPS} steps with their preparation: {spent[0]:.1f} ms to warm up, then {spent[1]:.1f} ms in the "
        f"first request and {spent[2]:.1f} ms in the second, that is {spent[1] / spent[2]:.2f} of the second's"
    )
    say()


def build_reference(work: Work, device: torch.device, *, tiny: bool) -> Any:
    """Diffusers' model with random weights of a scale that keeps activations in bounds."""
    torch.manual_seed(0)
    sizes = {**work.sizes, **(TINY[work.reference] if tiny else {})}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = work.reference(**sizes)
    finally:
        torch.set_default_dtype(previous)
    for name, parameter in model.named_parameters():
        if work.reference is WanTransformer3DModel and any(part in name for part in FLOAT32_PARAMETERS):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def same_weights(work: Work, theirs: Any, mesh: WorkerMesh | None = None) -> DiffusionTransformer:
    """Our model, or this rank's part of it, over the reference's own tensors."""
    with torch.device("meta"):
        ours = work.ours(dict(theirs.config))
    parallelize(ours, work.plan, mesh, heads=theirs.config[work.heads])
    shards, like = parameter_shards(ours), next(theirs.parameters())
    state = {name: shards[name].cut(value) if name in shards else value for name, value in theirs.state_dict().items()}
    zeros = {name: torch.zeros(ours.get_parameter(name).shape).to(like) for name in absent_biases(ours)}
    ours.load_state_dict(state | zeros, strict=True, assign=True)
    return ours.requires_grad_(False).eval()


def on(device: torch.device, given: Inputs) -> Inputs:
    """The inputs on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def float32_prediction(model: Any, inputs: Inputs) -> Tensor:
    """The reference's first prediction in float32."""
    return float32_predictions(model, inputs)[0]


def float32_predictions(model: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """The reference's predictions in float32. Each module that has weights is widened only while it runs."""
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
    """Relative L2."""
    return float((prediction.double() - exact).norm() / exact.norm())


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    began = now(device)
    run()
    return now(device) - began


def peak_beside(run: Callable[[], object], device: torch.device) -> float:
    """Most MB that a call takes beside what is there before; a graph's own memory is counted when it is captured."""
    if device.type != "cuda":
        return float("nan")
    empty(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def step_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of a call, by the device's own clock where it has one."""
    return milliseconds(run) if device.type == "cuda" else 1e3 * timed(run, device)


def in_turns(
    sides: Mapping[str, Callable[[], object]], clock: Callable[[Callable[[], object]], float], repeats: int
) -> dict[str, list[float]]:
    """What `clock` says of each side's calls: one round after the other, the sides in turn."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        for _ in range(3):
            run()
    for _ in range(repeats):
        for name, run in sides.items():
            spent[name].append(clock(run))
    return spent


def profile(run: Callable[[], object], path: Path) -> None:
    """Write a table of kernels by their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=110))


if __name__ == "__main__":
    main()
