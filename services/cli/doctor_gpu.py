"""Checks of GPUs, driver, kernel packages and attention backends.

services.cli.doctor_gpu_facts reads the facts in a separate process, because a broken CUDA library or kernel package can
crash or hang a process, and because a CUDA context occupies GPU memory until its process ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FailedPrecondition
from common.package_versions import installed_version
from common.tether import tethered
from models.kernels.packages import PACKAGES, Capability
from services.cli.doctor_results import Result, error, ok, warning

SECONDS = 300.0
"""Timeout for reading the facts, in seconds. It includes the compilation of kernels by QuACK and Triton."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_VERSION = re.compile(r"\s(\d+\.\d+(?:\.\d+)?)\s")
_GIB = 1 << 30
_MOST_LETTERS = 300


@dataclass(frozen=True)
class Gpu:
    """A GPU visible to torch: name, compute capability, total and free memory in bytes."""

    name: str
    capability: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class KernelTrial:
    """The result of testing one kernel package on a GPU. `error` is empty if the package works."""

    name: str
    version: str
    replacement: str
    error: str


@dataclass(frozen=True)
class NvidiaDriver:
    """The NVIDIA driver: version and newest supported CUDA version; both empty without a driver."""

    version: str = ""
    cuda: str = ""


@dataclass(frozen=True)
class GpuFacts:
    """Versions, GPUs and kernel trials of this host.

    `torch_cuda` is the CUDA version of the torch build; empty for a CPU build. `cuda_error` is the error of the CUDA
    initialization. `required_error` is the error of a package that the settings name. `attention` maps each compute
    capability to its attention backends.
    """

    torch: str
    torch_cuda: str
    driver: NvidiaDriver
    gpus: Sequence[Gpu] = ()
    cuda_error: str = ""
    trials: Sequence[KernelTrial] = ()
    required_error: str = ""
    attention: Mapping[str, str] | None = None


def read_gpu_facts(flags: Sequence[str] = ()) -> GpuFacts:
    """Run services.cli.doctor_gpu_facts with the given flags. Raises FailedPrecondition if it fails."""
    command = tethered([sys.executable, "-m", "services.cli.doctor_gpu_facts", *flags])
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise FailedPrecondition(f"torch and the kernel packages did not load within {SECONDS:g} s") from None
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        reason = textwrap.shorten(last, _MOST_LETTERS, placeholder=" ...")
        raise FailedPrecondition(f"the process that imports torch and the kernel packages failed: {reason}")
    # Libraries may print other lines before the JSON line.
    return _facts(json.loads(done.stdout.splitlines()[-1]))


def _facts(found: Mapping[str, Any]) -> GpuFacts:
    return GpuFacts(
        **{
            **found,
            "driver": read_driver(),
            "gpus": [Gpu(**each) for each in found["gpus"]],
            "trials": [KernelTrial(**each) for each in found["trials"]],
        }
    )


def read_driver(file: Path = _DRIVER_FILE) -> NvidiaDriver:
    """The driver of this host: version of the kernel module, CUDA version of libcuda."""
    try:
        match = _VERSION.search(file.read_text(encoding="utf-8"))
    except OSError:
        return NvidiaDriver()
    version = match[1] if match else "of an unknown version"
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return NvidiaDriver(version)
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)):
        return NvidiaDriver(version)
    return NvidiaDriver(version, f"{number.value // 1000}.{number.value % 1000 // 10}")


def check_gpus(facts: GpuFacts, device: str = "auto") -> Iterator[Result]:
    """Check the driver and list the GPUs. `device` is the setting of that name."""
    yield from _driver_results(facts)
    for number, gpu in enumerate(facts.gpus):
        yield ok(
            "gpu",
            f"cuda:{number} is {gpu.name}, compute capability {gpu.capability}, "
            f"{gpu.total_bytes / _GIB:.1f} GiB, {gpu.free_bytes / _GIB:.1f} GiB free",
        )
    if not facts.gpus and device.startswith("cuda"):
        yield error("gpu", f"device is {device}, and torch sees no GPU", "set device to auto or cpu, or attach a GPU")


def _driver_results(facts: GpuFacts) -> Iterator[Result]:
    driver, torch = facts.driver, f"torch {facts.torch}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not driver.version:
        if not facts.gpus:
            yield ok("gpu", "no NVIDIA driver and no GPU: workers compute on the CPU in float32")
    elif not facts.torch_cuda:
        advice = "install torch from PyPI, or from the index of your CUDA version"
        yield warning("gpu", f"driver {driver.version} is installed, but {torch} is built without CUDA", advice)
    elif driver.cuda and _major(driver.cuda) < _major(facts.torch_cuda):
        yield error(
            "gpu",
            f"driver {driver.version} supports CUDA {driver.cuda}, but {torch} is built for CUDA {facts.torch_cuda}",
            f"update the driver to one for CUDA {_major(facts.torch_cuda)}, or install torch for an older CUDA",
        )
    elif not facts.gpus:
        where = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        reason = facts.cuda_error or "no GPU is visible to this process"
        advice = "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that the container has access to a GPU"
        yield error("gpu", f"driver {driver.version} is installed, but {torch} sees no GPU{where}: {reason}", advice)
    else:
        runs = f", which supports CUDA {driver.cuda}" if driver.cuda else ""
        yield ok("gpu", f"driver {driver.version}{runs}; {torch} is built for CUDA {facts.torch_cuda}")


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _capability(text: str) -> Capability:
    """The compute capability of a Gpu: (9, 0) for "9.0"."""
    major, minor = text.split(".")
    return int(major), int(minor)


def check_kernels(facts: GpuFacts) -> Iterator[Result]:
    """Report the trial of each kernel package, and the packages that are not installed."""
    if facts.required_error:
        yield error("kernels", facts.required_error, "repair the package, or set kernels and attention_backend to auto")
    for trial in facts.trials:
        if trial.error:
            yield warning(
                "kernels",
                f"{trial.name} {trial.version} is unusable, {trial.replacement} is used: {trial.error}",
                f"reinstall {trial.name} for torch {facts.torch}, or uninstall it",
            )
        else:
            yield ok("kernels", f"{trial.name} {trial.version} loads and computes correctly")
    if facts.gpus:
        capabilities = [_capability(gpu.capability) for gpu in facts.gpus]
        absent = [
            package.name
            for package in PACKAGES
            if installed_version(package.name) is None and any(map(package.is_for, capabilities))
        ]
        if absent:
            yield ok("kernels", f"not installed (affects speed only): {', '.join(absent)}")


def check_attention(facts: GpuFacts) -> Iterator[Result]:
    """List the attention backends in use for each compute capability."""
    for capability, rows in (facts.attention or {}).items():
        yield ok("attention", f"on compute capability {capability}: {rows}")
