"""One denoising step of full published size on all ranks of a worker group, next to one rank's, over the same weights.

Every rank builds the same random weights in bfloat16 (as denoise_step.py), takes its part of them after the model's
plan, and predicts as the denoising stage does: on CUDA by replaying a graph, collectives included. Errors are relative
L2 against Diffusers' model in float32; a layout whose error is more than twice one rank's fails the run. Times are
those of rank 0, which waits for the others in every layer. First of all, attention to parts of the keys is compared
with its definition, as the ring merges it.

Run it with: torchrun --nproc-per-node 2 tests/bench/denoise_group.py
To try its logic without cards: torchrun --nproc-per-node 2 tests/bench/denoise_group.py --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from bench_device import empty
from bench_report import median, print_machine, print_table, say
from denoise_step import STEPS, WORKS, Work, build_reference, error, float32_prediction, on, peak_beside, timed
from torch import Tensor, distributed

from models.dits.base import DiffusionTransformer
from models.dits.flux_plan import FLUX_PLAN
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.dits.wan_plan import WAN_PLAN
from models.layers.attention import attention_with_lse
from models.layers.linear import join_all_weights
from models.layers.mesh import Degrees, WorkerMesh, make_mesh
from models.layers.parallel_plan import ParallelPlan
from models.layers.parallelize import parallelize
from models.layers.shards import parameter_shards
from models.layers.usp_attention import merge
from models.stages.prediction import Branch, StepGraphs

PLANS: Mapping[str, ParallelPlan] = {"flux": FLUX_PLAN, "wan": WAN_PLAN, "qwen": QWEN_IMAGE_PLAN}
HEADS = "num_attention_heads"


def main() -> int:
    """Measure what was asked for and print it on rank 0; 1 if a layout does not agree with one rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--work", nargs="*", default=list(WORKS), choices=tuple(WORKS))
    parser.add_argument("--axis", nargs="*", default=["tp", "ulysses", "ring"], choices=("tp", "ulysses", "ring"))
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if is_cuda else "gloo")
    tell = say if distributed.get_rank() == 0 else _silent
    if distributed.get_rank() == 0:
        print_machine(f"A denoising step on {distributed.get_world_size()} ranks, {args.device}")
    right = check_attention(device, tell)
    meshes = [make_mesh(Degrees(**{axis: distributed.get_world_size()}), device) for axis in args.axis]
    for name in args.work:
        right &= measure(WORKS[name], PLANS[name], meshes, args, device)
        empty(device)
    distributed.destroy_process_group()
    return 0 if right else 1


def _silent(text: str = "") -> None:
    """For ranks other than the first."""
    del text


def check_attention(device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether attention to two parts of the keys, merged, is attention to all, in each type; tells the errors."""
    right = True
    for dtype, tokens, most in ((torch.float32, (700, 333), 1e-5), (torch.bfloat16, (2304, 2001), 1e-2)):
        generator = torch.Generator(device).manual_seed(0)
        shape = (1, sum(tokens), 4, 128)
        q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
        parts = zip(k.split(tokens, dim=1), v.split(tokens, dim=1), strict=True)  # type: ignore[no-untyped-call]
        merged, lse = merge(merge(None, attention_with_lse(q, *next(parts))), attention_with_lse(q, *next(parts)))
        scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) / 128**0.5
        expected = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v.double())
        errors = error(merged, expected), error(lse, scores.logsumexp(-1))
        tell(f"Attention to parts of the keys in {dtype}: error {errors[0]:.1e}, of the log-sum-exp {errors[1]:.1e}")
        right &= max(errors) <= most
    tell("")
    return right


@torch.inference_mode()
def measure(
    work: Work, plan: ParallelPlan, meshes: list[WorkerMesh], args: argparse.Namespace, device: torch.device
) -> bool:
    """One rank, then each layout, one after the other: a card may not hold several. Whether errors are alike."""
    tiny = args.scale == "tiny"
    theirs = build_reference(work, device, tiny=tiny)
    their_inputs, inputs = (on(device, given) for given in work.inputs(tiny))
    exact = float32_prediction(theirs, their_inputs)
    rows: list[tuple[Any, ...]] = []
    for mesh in (None, *meshes):
        title = "one rank" if mesh is None else str(mesh.degrees)
        rows.append((title, *measure_part(part_of(work, plan, theirs, mesh), inputs, exact, args.repeats, device)))
        empty(device)
    if distributed.get_rank() == 0:
        say(f"## {work.title}{' (tiny)' if tiny else ''}")
        say()
        shown = [(*row[:3], f"{row[3]:.2e}", *row[4:]) for row in rows]
        print_table(("", "ms a step", "fastest", "error", "GB of weights", "MB beside the weights"), shown)
        say()
    return all(row[3] <= 2 * rows[0][3] + 1e-6 for row in rows)


def part_of(work: Work, plan: ParallelPlan, theirs: Any, mesh: WorkerMesh | None) -> DiffusionTransformer:
    """This rank's part of our model, cut from the reference's own tensors."""
    config = dict(theirs.config)
    with torch.device("meta"):
        ours = work.ours(config)
    parallelize(ours, plan, mesh, heads=config[HEADS])
    shards = parameter_shards(ours)
    whole: dict[str, Tensor] = theirs.state_dict()
    ours.load_state_dict(
        {name: shards[name].cut(value) if name in shards else value for name, value in whole.items()},
        strict=True,
        assign=True,
    )
    ours.requires_grad_(False).eval()
    join_all_weights(ours)
    return ours


def measure_part(
    ours: DiffusionTransformer, inputs: Mapping[str, Any], exact: Tensor, repeats: int, device: torch.device
) -> tuple[float, float, float, float, float]:
    """Median and fastest milliseconds of a step, error, GB of this rank's weights, MB that a step takes beside them."""
    given = dict(inputs)
    hidden_states, timestep = given.pop("hidden_states"), given.pop("timestep")
    prepared = ours.prepare(timestep[None].expand(STEPS, -1), **given)
    branch = Branch(ours, prepared, StepGraphs() if device.type == "cuda" else None)
    run = partial(branch.predict, hidden_states, 0)
    # The first call readies kernels and connections, the second captures the graph that the others replay.
    for _ in range(3):
        found = error(run(), exact)
    peak = peak_beside(lambda: ours.predict(hidden_states, prepared.steps[0], **prepared.constants), device)
    distributed.barrier()
    spent = [1e3 * timed(run, device) for _ in range(repeats)]
    held = sum(value.nbytes for value in ours.parameters()) / 1e9
    return median(spent), min(spent), found, held, peak


if __name__ == "__main__":
    sys.exit(main())
