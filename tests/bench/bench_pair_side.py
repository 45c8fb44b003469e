"""Process of one checkout for step_pairs.py: builds our denoiser of a workload and times its step.

Workloads and weights come from step_pairs.py's checkout. DiTs, kernels and bench_steps.py, which uses the modules of
the denoising stage, come from the measured checkout: step_pairs.py puts it first in PYTHONPATH. Commands are JSON
lines on stdin, replies are JSON lines on stdout; all other output goes to stderr. An error ends the process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, milliseconds, now
from bench_steps import RequestSteps, new_pool
from bench_weights import build_reference, on, same_weights
from bench_works import WORKS
from torch import Tensor

import models
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights

STEPS = 4
WARM_UP_STEPS = 3
"""Steps of the warm-up; the third step is the first one that only replays a captured graph."""


def main() -> None:
    """Process commands until the end of stdin."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="the measured checkout")
    parser.add_argument("--device", required=True, choices=("cuda", "cpu"))
    parser.add_argument("--scale", required=True, choices=("full", "tiny"))
    args = parser.parse_args()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        imported = Path(models.__path__[0]).parent
        if not imported.samefile(args.tree):
            raise RuntimeError(
                f"--tree: {args.tree} is not {imported}, the folder of the imported models; set PYTHONPATH"
            )
        device = torch.device(args.device)
        try_packages(device)
        side = Side(device, is_tiny=args.scale == "tiny")
        _answer(answers, {"works": list(WORKS)})
        for line in sys.stdin:
            command = json.loads(line)
            _answer(answers, side.build(command["build"]) if "build" in command else side.measure(command["measure"]))


class Side:
    """Holds at most one denoiser, with a prepared request."""

    def __init__(self, device: torch.device, *, is_tiny: bool) -> None:
        self._device = device
        self._is_tiny = is_tiny
        self._resources = ExitStack()
        self._step: Callable[[], Sequence[Tensor]] | None = None

    @torch.inference_mode()
    def build(self, name: str) -> dict[str, Any]:
        """Draw the workload's weights, run a few steps, and return a digest of the last step.

        Raises RuntimeError if a prediction is not finite, as its digest would be meaningless.
        """
        self._step = None
        self._resources.close()
        empty(self._device)
        work = WORKS[name]
        # The reference is freed before weights are fused: two copies in two processes would exceed the GPU memory.
        ours = same_weights(work, build_reference(work, self._device, tiny=self._is_tiny))
        empty(self._device)
        join_all_weights(ours)
        empty(self._device)
        inputs = on(self._device, work.inputs(self._is_tiny)[1])
        latents, timestep = {name: inputs.pop(name) for name in work.latents}, inputs.pop("timestep")
        timesteps = timestep[None].expand(STEPS, *timestep.shape)
        steps = RequestSteps(new_pool(self._device), ours, timesteps, inputs, latents)
        self._resources.enter_context(steps)
        self._step = lambda: work.parts(steps.predict_parts(latents, 0))
        for _ in range(WARM_UP_STEPS):
            predictions = self._step()
        if not all(bool(each.isfinite().all()) for each in predictions):
            raise RuntimeError(f"{name}: a prediction is not finite")
        return {"digest": _digest(predictions)}

    @torch.inference_mode()
    def measure(self, steps: int) -> dict[str, Any]:
        """Time per step in ms, from a burst of steps; on a GPU by CUDA events."""
        assert self._step is not None, "measure() needs a previous build()"
        if self._device.type == "cuda":
            return {"milliseconds": milliseconds(self._step, calls=steps)}
        began = now(self._device)
        for _ in range(steps):
            self._step()
        return {"milliseconds": 1e3 * (now(self._device) - began) / steps}


def _digest(predictions: Sequence[Tensor]) -> str:
    """SHA-256 of the bytes of all predictions."""
    digest = hashlib.sha256()
    for each in predictions:
        digest.update(each.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _answer(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
