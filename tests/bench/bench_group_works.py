"""Workloads for worker groups: the single-GPU workloads and larger ones, some with both CFG branches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from bench_inputs import flux_inputs, qwen_inputs, wan_inputs
from bench_works import WORKS, Work


@dataclass(frozen=True)
class GroupWork:
    """A workload whose step predicts each of `branches` once; all branches have inputs of equal shapes."""

    work: Work
    branches: tuple[str, ...] = ("positive",)


_GUIDED = ("positive", "negative")

GROUP_WORKS = {
    **{name: GroupWork(work) for name, work in WORKS.items()},
    "flux-2048": GroupWork(
        replace(WORKS["flux"], title="FLUX.1-dev 2048x2048, 512 text tokens", inputs=partial(flux_inputs, side=128))
    ),
    "qwen-1328": GroupWork(
        replace(
            WORKS["qwen"],
            title="Qwen-Image 1328x1328, 200 text tokens, two branches",
            inputs=partial(qwen_inputs, side=83),
        ),
        _GUIDED,
    ),
    "wan-14b-720p": GroupWork(
        replace(
            WORKS["wan-14b"],
            title="Wan2.1-14B 720x1280, 81 frames, two branches",
            inputs=partial(wan_inputs, grid=(21, 90, 160)),
        ),
        _GUIDED,
    ),
}
