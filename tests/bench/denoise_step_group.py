"""One denoising step on several GPUs: our worker group against Diffusers' context parallelism.

Every rank builds the same random weights of published size, in bfloat16. Our side runs with the given degrees.
Diffusers runs with Ulysses over all ranks, or without parallelism on a single rank; its repeated blocks are compiled if
requested. Both sides alternate and are timed by CUDA events; the time of the slowest rank counts. Guided workloads
predict two branches per step: ours divides them among the ranks of the cfg axis, Diffusers predicts them sequentially.
Errors are relative L2 of the first branch against Diffusers' model in float32 on one rank. Memory is the peak on
rank 0 without the weights.

Run it with: torchrun --nproc-per-node 2 tests/bench/denoise_step_group.py --ulysses 2; the number of GPUs must equal
the product of the degrees. To check it without GPUs, add --device cpu --scale tiny --alone: Diffusers' parallelism
needs GPUs, and its Ulysses needs token counts that are divisible by the number of ranks
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from bench_device import empty, milliseconds, now
from bench_group_works import GROUP_WORKS, GroupWork
from bench_kernel_times import KernelTimes, kernel_times
from bench_report import median, print_machine, print_table, say
from bench_steps import new_pool
from bench_weights import build_reference, on, on_meta, over_weights
from bench_works import Work
from denoise_step import STEPS, float32_predictions, largest_error, peak_beside, timed
from diffusers import ContextParallelConfig
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, distributed

from models.dits.base import DiffusionTransformer
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights
from models.parallel.mesh import AXES, Degrees, WorkerMesh, make_mesh
from models.parallel.parallelize import parallelize
from models.parallel.shards import parameter_shards
from models.stages.predictor import Branch, Branches, lease_branch

Run = Callable[[], tuple[Tensor, ...]]

ROLE = "transformer"
CALLS = 5
"""Steps of a round, enqueued without synchronization between steps."""
LONG_STEP_MS = 1500.0
"""Rounds of longer steps have one step."""


def main() -> None:
    """Measure the selected workloads; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", default=["flux", "wan"], choices=tuple(GROUP_WORKS), help="workloads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of five steps, or of one long step")
    for axis in reversed(AXES):
        parser.add_argument(f"--{axis}", type=int, default=1, help=f"ranks of the {axis} axis")
    parser.add_argument("--compile", action="store_true", help="compile Diffusers by repeated blocks")
    parser.add_argument("--alone", action="store_true", help="measure only ours")
    parser.add_argument("--no-float32", action="store_true", help="skip the float32 reference and the errors")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("LOCAL_RANK is not set; start this program with torchrun --nproc-per-node RANKS")
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    one_host = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
    try_packages(device)
    degrees = Degrees(**{axis: getattr(args, axis) for axis in AXES})
    mesh = make_mesh(degrees, device, one_host=one_host)
    if mesh.rank == 0:
        print_machine(f"A denoising step on {args.device}, {degrees}")
        if device.type == "cuda":
            say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, NCCL {torch.cuda.nccl.version()}")  # type: ignore[no-untyped-call]
            say()
    for name in args.work:
        measure(GROUP_WORKS[name], mesh, args)
        empty(device)
    distributed.destroy_process_group()


@torch.inference_mode()
def measure(group_work: GroupWork, mesh: WorkerMesh, args: argparse.Namespace) -> None:
    """Build both sides, compare their results, time them alternately, and print a table."""
    work, device, tiny = group_work.work, mesh.device, args.scale == "tiny"
    theirs = build_reference(work, device, tiny=tiny)
    their_inputs, our_inputs = (on(device, given) for given in work.inputs(tiny))
    exact = None if args.no_float32 else exact_predictions(theirs, their_inputs)
    ours = sharded_weights(work, theirs, mesh)
    join_all_weights(ours)
    with ExitStack() as stack:
        sides: dict[str, Run] = {f"ours, {mesh.degrees}": our_step(group_work, ours, mesh, our_inputs, stack)}
        if not args.alone:
            ranks = mesh.degrees.world_size
            make_parallel(theirs, device, ranks, compiled=args.compile)
            name = f"Diffusers, ulysses={ranks}{', compiled' if args.compile else ''}"
            sides[name] = partial(their_step, theirs, their_inputs, len(group_work.branches))
        predictions = {name: run() for name, run in sides.items()}
        errors = {name: largest_error(each, exact) if exact else float("nan") for name, each in predictions.items()}
        del predictions
        peaks, calls = {}, {}
        for name, run in sides.items():
            began = now(device)
            peaks[name] = peak_beside(run, device) / 1e3
            calls[name] = 1 if slowest(1e3 * (now(device) - began), device) > LONG_STEP_MS else CALLS
        spent = in_rounds(sides, calls, device, args.repeats)
        times = {name: profiled(run, device) for name, run in sides.items()}
    if mesh.rank != 0:
        return
    say(f"## {work.title}{' (tiny)' if tiny else ''}")
    say()
    header = ("", "ms per step", "fastest", "communication, ms", "exposed fraction", "GB without weights", "error")
    rows = [
        (
            name,
            median(each),
            min(each),
            times[name].communication,
            f"{times[name].exposed / times[name].total:.3f}",
            peaks[name],
            f"{errors[name]:.2e}",
        )
        for name, each in spent.items()
    ]
    print_table(header, rows)


def exact_predictions(theirs: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The reference's predictions in float32, by PyTorch's SDPA.

    A backend that make_parallel() set on the model of an earlier workload stays active in the process.
    """
    with attention_backend("native"):
        return float32_predictions(theirs, dict(inputs))


def our_step(
    group_work: GroupWork,
    ours: DiffusionTransformer,
    mesh: WorkerMesh,
    inputs: Mapping[str, Any],
    stack: ExitStack,
) -> Run:
    """A step of the worker group, as the denoising stage runs it; returns the first branch's predictions."""
    work, kept = group_work.work, dict(inputs)
    latents, timestep = {name: kept.pop(name) for name in work.latents}, kept.pop("timestep")
    lease = stack.enter_context(new_pool(mesh.device).leases())
    timesteps = timestep[None].expand(STEPS, *timestep.shape)

    def make(name: str, role: str) -> Branch:
        return lease_branch(lease, f"{role}/{name}", ours, ours.prepare(timesteps, **kept), latents)

    names = group_work.branches
    branches = Branches(names, (ROLE,), make, mesh.axis("cfg"), torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        predicted = branches.predict(names, ROLE, lambda branch: branch.predict(latents, 0), latents)
        return work.parts(predicted[names[0]])

    return step


def their_step(theirs: Any, inputs: Mapping[str, Any], branches: int) -> tuple[Tensor, ...]:
    """A step of Diffusers' model, which computes its branches sequentially."""
    made: tuple[Tensor, ...] = ()
    for _ in range(branches):
        made = theirs(**inputs, return_dict=False)
    return made


def sharded_weights(work: Work, theirs: Any, mesh: WorkerMesh) -> DiffusionTransformer:
    """This rank's part of our model, on the reference's tensors or copies of their shards."""
    ours = on_meta(work, theirs)
    parallelize(ours, work.plan, mesh, heads=theirs.config[work.heads])
    shards = parameter_shards(ours)
    state = {
        name: shards[name].select(value) if name in shards else value for name, value in theirs.state_dict().items()
    }
    return over_weights(ours, state)


def make_parallel(theirs: Any, device: torch.device, ranks: int, *, compiled: bool) -> None:
    """Shard the sequence of Diffusers' model over all ranks; on a GPU, use its fastest attention."""
    if device.type == "cuda":
        theirs.set_attention_backend("_native_cudnn")
    if ranks > 1:
        theirs.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    if compiled:
        # Without fullgraph=True, because the compiler cannot trace the sharding of Wan's tensors.
        theirs.compile_repeated_blocks()


def in_rounds(
    sides: Mapping[str, Run], calls: Mapping[str, int], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of each side's steps on the slowest rank, one value per round; the sides alternate."""
    for name, run in sides.items():
        # For a short step, this is the third call, after which compilers and graphs are ready.
        for _ in range(calls[name] // CALLS):
            run()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            distributed.barrier()
            took = milliseconds(run, calls=calls[name]) if device.type == "cuda" else 1e3 * timed(run, device)
            spent[name].append(slowest(took, device))
    return spent


def profiled(run: Run, device: torch.device) -> KernelTimes:
    """Times of this rank's kernels; NaN on a CPU."""
    distributed.barrier()
    if device.type != "cuda":
        run()
        return KernelTimes(*[float("nan")] * 3)
    return kernel_times(run, 1)


def slowest(milliseconds: float, device: torch.device) -> float:
    """The largest value of all ranks."""
    largest = torch.tensor(milliseconds, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return float(largest)


if __name__ == "__main__":
    main()
