"""Prints what torch and the kernel packages find on this host, as a line of JSON: `fleet doctor` starts this program.

Flags and FLEET_* variables are those of a worker's settings: --kernels and --attention-backend.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import FailedPrecondition
from common.settings import load_settings, setting
from models.kernels.attention_table import TABLE
from models.kernels.packages import (
    ATTENTION_PACKAGES,
    AttentionChoice,
    Capability,
    KernelChoice,
    Outcome,
    PackageChoice,
)
from models.kernels.trials import outcomes_on
from services.cli.doctor_gpu import Gpu, KernelTrial


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Settings of a worker that decide which kernel packages are tried."""

    kernels: tuple[PackageChoice, ...] = setting(("auto",), help="kernel packages to try")
    attention_backend: AttentionChoice = setting("auto", help="attention on a GPU")


def main(argv: Sequence[str]) -> int:
    """Print the facts."""
    # A service's file has other keys too; `fleet doctor` passes the values that it found there as flags.
    environ = {name: value for name, value in os.environ.items() if name != "FLEET_CONFIG"}
    settings = load_settings(TrialSettings, argv, prog="doctor_gpu_facts", environ=environ)
    sys.stdout.write(json.dumps(facts(KernelChoice(settings.kernels, settings.attention_backend))) + "\n")
    return 0


def facts(choice: KernelChoice) -> dict[str, Any]:
    """The fields of GpuFacts but the driver's. Tries the packages once for each compute capability of this host."""
    gpus, cuda_error = _gpus()
    found: dict[Capability, list[Outcome]] = {}
    required_error = ""
    for number in range(len(gpus)):
        capability = torch.cuda.get_device_capability(number)
        if capability not in found:
            try:
                found[capability] = _tried(number, capability, choice)
            except FailedPrecondition as error:
                required_error = error.message
                break
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "gpus": list(map(dataclasses.asdict, gpus)),
        "cuda_error": cuda_error,
        "trials": [dataclasses.asdict(each) for outcomes in found.values() for each in _trials(outcomes)],
        "required_error": required_error,
        "attention": {_dotted(each): attention_rows(each, choice, outcomes) for each, outcomes in found.items()},
    }


def _tried(number: int, capability: Capability, choice: KernelChoice) -> list[Outcome]:
    device = torch.device("cuda", number)
    with torch.cuda.device(device):
        return outcomes_on(device, capability, choice)


def _gpus() -> tuple[list[Gpu], str]:
    """The GPUs that torch sees, and why it can use none."""
    if torch.version.cuda is None:
        return [], ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return [_gpu(number) for number in range(torch.cuda.device_count())], ""
    except (RuntimeError, AssertionError) as error:
        return [], " ".join(str(error).split())


def _gpu(number: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(number)
    capability = _dotted(torch.cuda.get_device_capability(number))
    return Gpu(torch.cuda.get_device_name(number), capability, total, free)


def _trials(outcomes: Sequence[Outcome]) -> Iterator[KernelTrial]:
    for each in outcomes:
        yield KernelTrial(each.package.name, each.version, each.package.replacement, each.error)


def attention_rows(capability: Capability, choice: KernelChoice, outcomes: Sequence[Outcome]) -> str:
    """The rows of the attention table that are in force, in order, as a text; `outcomes` are those of the trials.

    The last one, PyTorch's own choice, is for all that no row takes: other dtypes, and larger heads.
    """
    if choice.attention != "auto":
        return f"{choice.attention}, which attention_backend names; else sdpa"
    usable = {each.package.name for each in outcomes if not each.error}
    texts = []
    for row in TABLE.get(capability, ()):
        package = ATTENTION_PACKAGES.get(row.backend)
        if package is None or package in usable:
            texts.append(row.backend + (f" from {row.min_work} heads x tokens on" if row.min_work else ""))
    return ", else ".join([*texts, "sdpa"])


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
