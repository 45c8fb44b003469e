"""Streaming of a video during its generation: causal Wan 1.3B at 480x832 on CUDA, with random weights.

Denoising and decoding first run separately, then concurrently in this process as stages of a pipeline, without RPCs.
For each run, the output has the times to the first block, the first second of video and the whole video, and the frame
rate; then the memory of the KV cache and of both stages. With a second GPU, decoding runs there; stages that share a
GPU compete for it. No network and no disk space are needed.

Run it with: python tests/bench/cuda_stream.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse

import torch
from bench_report import print_machine, print_table, print_verdict, say
from bench_stream import FRAME_RATE, SCALES, CausalWan, Timeline, build, decode, denoise, peak_bytes, stream

from models.kernels.trials import try_packages

FIRST_BLOCK_WITHIN = 1.3
TOTAL_WITHIN = 1.05


def main() -> None:
    """Measure all runs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--repeats", type=int, default=3, help="concurrent runs of both stages")
    args = parser.parse_args()
    denoiser, decoder = devices(args.device)
    for device in {denoiser, decoder}:
        try_packages(device)
    scale = SCALES[args.scale]
    print_machine(
        f"Causal Wan on {denoiser}, decoded on {decoder}: {scale.height}x{scale.width}, {scale.frames} frames"
    )
    if denoiser.type == "cuda":
        say(f"{torch.cuda.get_device_name(denoiser)}, CUDA {torch.version.cuda}")
        say()
    wan = build(scale, denoiser, decoder)
    _, blocks = denoise(wan)
    decode(wan, blocks)
    alone, blocks = denoise(wan)
    decoding = decode(wan, blocks)
    stream(wan)
    runs = sorted((stream(wan) for _ in range(args.repeats)), key=lambda run: run.total)
    print_streams(alone, decoding, runs[len(runs) // 2], is_shared=denoiser == decoder)
    print_memory(wan, denoiser, decoder)


def devices(kind: str) -> tuple[torch.device, torch.device]:
    """Devices of denoising and decoding."""
    if kind == "cpu":
        return torch.device("cpu"), torch.device("cpu")
    return torch.device("cuda", 0), torch.device("cuda", min(1, torch.cuda.device_count() - 1))


def print_streams(denoising: Timeline, decoding: Timeline, both: Timeline, *, is_shared: bool) -> None:
    """Print the times, and whether first block and overlap are within their budgets."""
    frames = sum(both.frames)
    print_table(
        ("seconds", "first block", "first second of video", "whole video", "frames per second"),
        [
            ("denoising alone", denoising.blocks[0], "-", denoising.total, frames / denoising.total),
            (
                "decoding alone",
                decoding.parts[0],
                decoding.seconds_to(FRAME_RATE),
                decoding.total,
                frames / decoding.total,
            ),
            ("both concurrently", both.parts[0], both.seconds_to(FRAME_RATE), both.total, frames / both.total),
        ],
    )
    own = denoising.blocks[0] + decoding.parts[0]
    print_verdict("first block available", both.parts[0], FIRST_BLOCK_WITHIN * own, "s")
    one_block = min(denoising, decoding, key=lambda each: each.total)
    longest, blocks = max(denoising.total, decoding.total), len(both.parts)
    budget = TOTAL_WITHIN * longest + one_block.total / blocks
    if is_shared:
        say(f"whole video: {both.total:.2f} s; {budget:.2f} s is the budget with a GPU for each stage")
    else:
        print_verdict("whole video", both.total, budget, "s")
    say()


def print_memory(wan: CausalWan, denoiser: torch.device, decoder: torch.device) -> None:
    """Print memory without the weights."""
    rows: list[tuple[str, float]] = [("KV cache of a request", wan.kv_bytes / 1e9)]
    blocks = denoise(wan)[1]
    rows.append(("denoising, total", peak_bytes(denoiser, lambda: denoise(wan)) / 1e9))
    rows.append(("decoding", peak_bytes(decoder, lambda: decode(wan, blocks)) / 1e9))
    print_table(("GB without weights", ""), rows)


if __name__ == "__main__":
    main()
