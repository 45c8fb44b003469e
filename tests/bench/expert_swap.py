"""Swap of Wan 2.2 A14B's experts on CUDA, compared with one copy of as many bytes from pinned memory.

Both experts have random bfloat16 weights of published size in host memory; one of them is on the device. A request
swaps when its timesteps pass the boundary; the next request swaps back at its start.

Run it with: python tests/bench/expert_swap.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse

import torch
from bench_device import now
from bench_report import median, print_machine, print_table, say
from bench_works import TINY, WORKS
from diffusers import WanTransformer3DModel

from models.dits.base import DiffusionTransformer
from models.experts import SwappedExpert, on_device, swapped_experts
from models.layers.linear import join_all_weights

EXPERTS = ("transformer", "transformer_2")


def main() -> None:
    """Alternate swaps and plain copies, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--repeats", type=int, default=3, help="swaps to each expert")
    args = parser.parse_args()
    device = torch.device(args.device)
    print_machine(f"Swap of experts on {args.device}")
    with torch.inference_mode():
        experts = swapped_experts(EXPERTS, lambda _: random_expert(device, tiny=args.scale == "tiny"))
        measure([each for each in experts.values() if isinstance(each, SwappedExpert)], device, args.repeats)


def random_expert(device: torch.device, *, tiny: bool) -> DiffusionTransformer:
    """Build a denoiser with random weights on the device."""
    work = WORKS["wan-14b"]
    with torch.device("meta"):
        config = WanTransformer3DModel(**{**work.sizes, **(TINY[WanTransformer3DModel] if tiny else {})}).config
        model = work.ours(dict(config)).bfloat16()
    model.to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    join_all_weights(model)
    return model


def measure(experts: list[SwappedExpert], device: torch.device, repeats: int) -> None:
    """Time each swap, and each copy of one tensor of as many bytes."""
    size = sum(len(each) for each in experts[0].weights)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    spent: dict[str, list[float]] = {"swap of experts": [], "one copy of as many bytes": []}
    for _ in range(repeats):
        for expert in experts:
            began = now(device)
            on_device(expert)
            spent["swap of experts"].append(now(device) - began)
            began = now(device)
            target.copy_(host, non_blocking=True)
            spent["one copy of as many bytes"].append(now(device) - began)
    say(f"{size / 1e9:.1f} GB per expert")
    say()
    print_table(
        ("", "seconds", "fastest", "GB/s"),
        [(name, median(each), min(each), size / 1e9 / median(each)) for name, each in spent.items()],
    )


if __name__ == "__main__":
    main()
