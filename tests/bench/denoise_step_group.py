"""One denoising step at published size on several GPUs: our worker group vs Diffusers' context parallelism.

Every rank builds the same random bfloat16 weights. Ours runs with the given degrees, Diffusers with Ulysses over all
ranks, optionally with compiled repeated blocks. The sides alternate and are timed by CUDA events; the slowest rank
counts. Errors are relative L2 against Diffusers' model in float32 on one rank.

Run it with: torchrun --nproc-per-node 2 tests/bench/denoise_step_group.py --ulysses 2; to try it without GPUs, add
--device cpu --scale tiny --alone, as Diffusers' parallelism needs GPUs
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_device import empty
from bench_report import median, print_machine, print_table, say
from bench_steps import RequestSteps, new_pool
from bench_weights import build_reference, on, on_meta, over_weights
from bench_works import WORKS, Work
from denoise_step import STEPS, float32_predictions, in_turns, largest_error, step_milliseconds
from diffusers import ContextParallelConfig
from torch import Tensor, distributed

from models.dits.base import DiffusionTransformer
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights
from models.parallel.mesh import Degrees, WorkerMesh, make_mesh
from models.parallel.parallelize import parallelize
from models.parallel.shards import parameter_shards


def main() -> None:
    """Measure the selected workloads; rank 0 prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", default=["flux", "wan"], choices=tuple(WORKS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds of five steps")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ulysses", type=int, default=1)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile Diffusers by repeated blocks")
    parser.add_argument("--alone", action="store_true", help="measure ours only")
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    one_host = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    try_packages(device)
    mesh = make_mesh(Degrees(tp=args.tp, ulysses=args.ulysses, ring=args.ring), device, one_host=one_host)
    if mesh.rank == 0:
        print_machine(f"A denoising step on {mesh.degrees.world_size} ranks, {mesh.degrees}")
        if device.type == "cuda":
            say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}")  # type: ignore[no-untyped-call]
            say()
    for name in args.work:
        measure(WORKS[name], mesh, args)
        empty(device)
    distributed.destroy_process_group()


@torch.inference_mode()
def measure(work: Work, mesh: WorkerMesh, args: argparse.Namespace) -> None:
    """Build both sides, compare their results, time them alternately, print."""
    device, tiny = mesh.device, args.scale == "tiny"
    theirs = build_reference(work, device, tiny=tiny)
    their_inputs, our_inputs = (on(device, given) for given in work.inputs(tiny))
    exact = float32_predictions(theirs, their_inputs)
    ours = sharded_weights(work, theirs, mesh)
    join_all_weights(ours)
    latents, timestep = {name: our_inputs.pop(name) for name in work.latents}, our_inputs.pop("timestep")
    steps = RequestSteps(new_pool(device), ours, timestep[None].expand(STEPS, *timestep.shape), our_inputs, latents)
    sides: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        f"ours, {mesh.degrees}": lambda: work.parts(steps.predict_parts(latents, 0))
    }
    if not args.alone:
        name = f"Diffusers, ulysses={mesh.degrees.world_size}{', compiled' if args.compile else ''}"
        share_out(theirs, device, mesh.degrees.world_size, compiled=args.compile)
        sides[name] = lambda: theirs(**their_inputs, return_dict=False)
    errors = {name: largest_error(run(), exact) for name, run in sides.items()}
    spent = in_turns(sides, partial(slowest_milliseconds, device), args.repeats)
    if mesh.rank == 0:
        say(f"## {work.title}{' (tiny)' if tiny else ''}")
        say()
        header = ("", "ms per step", "fastest", "error")
        print_table(header, [(name, median(each), min(each), f"{errors[name]:.2e}") for name, each in spent.items()])


def sharded_weights(work: Work, theirs: Any, mesh: WorkerMesh) -> DiffusionTransformer:
    """This rank's part of our model, on the reference's tensors or copies of their shards."""
    ours = on_meta(work, theirs)
    parallelize(ours, work.plan, mesh, heads=theirs.config[work.heads])
    shards = parameter_shards(ours)
    state = {name: shards[name].cut(value) if name in shards else value for name, value in theirs.state_dict().items()}
    return over_weights(ours, state)


def share_out(theirs: Any, device: torch.device, ranks: int, *, compiled: bool) -> None:
    """Enable Diffusers' sequence parallelism over all ranks, with its fastest backend here."""
    if device.type == "cuda":
        theirs.set_attention_backend("_native_cudnn")
    theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    if compiled:
        # Without fullgraph: the compiler cannot trace how Diffusers shards Wan's tensors.
        theirs.compile_repeated_blocks()


def slowest_milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """Time in ms of a collective call, on the slowest rank."""
    distributed.barrier()
    slowest = torch.tensor(step_milliseconds(run, device), device=device)
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    return float(slowest)


if __name__ == "__main__":
    main()
