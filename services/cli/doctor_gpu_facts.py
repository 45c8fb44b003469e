"""Prints the GPUs, torch versions and kernel trials of this host as one line of JSON. `fleet doctor` runs it.

Accepts the worker settings --kernels and --attention-backend, as flags or FLEET_* variables.
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
    PackageChoice,
    TrialOutcome,
)
from models.kernels.trials import outcomes_on
from services.cli.doctor_gpu import Gpu, KernelTrial


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Worker settings that select the kernel packages to try."""

    kernels: tuple[PackageChoice, ...] = setting(("auto",), help="kernel packages to try")
    attention_backend: AttentionChoice = setting("auto", help="attention on a GPU")


def main(argv: Sequence[str]) -> int:
    """Print the facts; returns 0."""
    # Ignores the service's settings file, which has other keys. `fleet doctor` passes the settings as flags.
    environ = {name: value for name, value in os.environ.items() if name != "FLEET_CONFIG"}
    settings = load_settings(TrialSettings, argv, prog="doctor_gpu_facts", environ=environ)
    sys.stdout.write(json.dumps(facts(KernelChoice(settings.kernels, settings.attention_backend))) + "\n")
    return 0


def facts(choice: KernelChoice) -> dict[str, Any]:
    """The fields of GpuFacts except `driver`. Tests the packages once per compute capability of this host."""
    gpus, cuda_error = _gpus()
    found: dict[Capability, list[TrialOutcome]] = {}
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


def _tried(number: int, capability: Capability, choice: KernelChoice) -> list[TrialOutcome]:
    device = torch.device("cuda", number)
    with torch.cuda.device(device):
        return outcomes_on(device, capability, choice)


def _gpus() -> tuple[list[Gpu], str]:
    """The GPUs visible to torch, and the error if CUDA cannot be initialized."""
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


def _trials(outcomes: Sequence[TrialOutcome]) -> Iterator[KernelTrial]:
    for each in outcomes:
        yield KernelTrial(each.package.name, each.version, each.package.replacement, each.error)


def attention_rows(capability: Capability, choice: KernelChoice, outcomes: Sequence[TrialOutcome]) -> str:
    """The attention backends in use, in order of preference, as text. `outcomes` are the results of the trials.

    The last backend, PyTorch's SDPA, is used for inputs that no other backend supports, such as larger head sizes.
    """
    if choice.attention != "auto":
        return f"{choice.attention} (set by attention_backend), else sdpa"
    usable = {each.package.name for each in outcomes if not each.error}
    texts = []
    for row in TABLE.get(capability, ()):
        package = ATTENTION_PACKAGES.get(row.backend)
        if package is None or package in usable:
            texts.append(row.backend + (f" for at least {row.min_work} heads x tokens" if row.min_work else ""))
    return ", else ".join([*texts, "sdpa"])


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
