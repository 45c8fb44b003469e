"""Trials of optional kernel packages at worker start: import each package, run it on a tiny input.

Without a trial, a broken package would fail the first request. A missing package is not an error and logs no warning,
unless a setting names the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from common.errors import FailedPrecondition
from common.logs import get_logger
from models.kernels import attention_backends
from models.kernels.attention_table import TABLE
from models.kernels.copy_streams import CopyStreams
from models.kernels.packages import (
    ATTENTION_PACKAGES,
    PACKAGES,
    Capability,
    KernelChoice,
    KernelPackage,
    PackageName,
    TrialOutcome,
    record,
)

_log = get_logger(__name__)

_MAX_ERROR_LENGTH = 200
"""Largest number of characters of a package's error in logs and in the worker's announcement."""

_TOLERANCE = 3e-2
"""Largest difference between a bfloat16 result of magnitude 1 to 4 and its float32 value."""

_TRYING = threading.Lock()


class _Latest:
    """Device and choice of the latest trials, which all services of a process share."""

    key: tuple[torch.device, KernelChoice] | None = None


def try_packages(device: torch.device, choice: KernelChoice | None = None) -> None:
    """Try the packages that may be used on a device, and record the outcomes. On a CPU no package is tried.

    Raises FailedPrecondition if a package that a setting names is missing, broken or not for the device, if a setting
    names cuDNN and its attention fails, and if any package leaves the device unusable.
    """
    choice = choice or KernelChoice()
    if device.type != "cuda":
        if choice.required or choice.attention == "cudnn":
            named = choice.setting_of(choice.required[0]) if choice.required else "attention_backend: cudnn"
            raise FailedPrecondition(f"{named} needs a GPU, and the device is {device}; remove the setting")
        return
    with _TRYING:
        if _Latest.key == (device, choice):
            return
        with torch.cuda.device(device):
            if choice.attention == "cudnn":
                _require_cudnn(device)
            record(choice, outcomes_on(device, torch.cuda.get_device_capability(device), choice))
        _Latest.key = (device, choice)


def outcomes_on(device: torch.device, capability: Capability, choice: KernelChoice) -> list[TrialOutcome]:
    """Try the packages that the choice allows on GPUs of the capability. Raises the errors of try_packages()."""
    found = []
    for package in _packages_to_try(capability, choice):
        required = package.name in choice.required
        field = "kernels" if package.name in choice.packages else "attention_backend"
        if required and not package.is_for(capability):
            message = f"{choice.setting_of(package.name)} is not for compute capability {_dotted(capability)}"
            capabilities = ", ".join(map(_dotted, package.capabilities))
            raise FailedPrecondition(f"{message}; it is for {capabilities}. Use auto on this GPU", field=field)
        outcome = try_package(package, device)
        if required and (outcome is None or outcome.error):
            error = "is not installed" if outcome is None else f"{outcome.version} is broken: {outcome.error}"
            message = f"{choice.setting_of(package.name)} is not usable: {package.name} {error}"
            raise FailedPrecondition(f"{message}; install a working version, or use auto", field=field)
        if outcome is not None:
            found.append(outcome)
    return found


def try_package(package: KernelPackage, device: torch.device) -> TrialOutcome | None:
    """Import a package, run it on a tiny input, and log a failure. Returns None if it is not installed."""
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module(package.module)
        for result, expected in _TRIALS[package.name](device):
            _compare(result, expected)
    except Exception as error:  # noqa: BLE001  (third-party code: any exception means that the package is unusable)
        text = textwrap.shorten(f"{type(error).__name__}: {error}", _MAX_ERROR_LENGTH, placeholder=" ...")
        _log.warning(
            "kernel package is unusable",
            package=package.name,
            version=version,
            replacement=package.replacement,
            error=text,
        )
        _check_device(device, package)
        return TrialOutcome(package, version, text)
    return TrialOutcome(package, version)


def _require_cudnn(device: torch.device) -> None:
    q = _random(device, 1, 2, 128, 128)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            result = scaled_dot_product_attention(q, q, q)
        wide = q.float()
        _compare(result, scaled_dot_product_attention(wide, wide, wide))
    except (RuntimeError, ArithmeticError) as error:
        raise FailedPrecondition(
            f"attention_backend: cudnn does not work on {device}: {error}; use auto", field="attention_backend"
        ) from error


def _packages_to_try(capability: Capability, choice: KernelChoice) -> Iterator[KernelPackage]:
    """Packages to try: required packages; with auto, also the packages of layers and the attention table."""
    rows = TABLE.get(capability, ()) if choice.attention == "auto" else ()
    in_table = {ATTENTION_PACKAGES.get(row.backend) for row in rows}
    for package in PACKAGES:
        is_used = package.name in in_table if package.name in ATTENTION_PACKAGES.values() else True
        if package.name in choice.required or ("auto" in choice.packages and is_used and package.is_for(capability)):
            yield package


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _compare(result: Tensor, expected: Tensor) -> None:
    """Raise ArithmeticError where a result is wrong by _TOLERANCE or more. Waits for the device."""
    error = float((result.float() - expected.float()).abs().max())
    # Not `error >= _TOLERANCE`, which is False for NaN.
    if not error < _TOLERANCE:
        raise ArithmeticError(f"wrong result: error {error:g} is not below {_TOLERANCE:g}")


def _check_device(device: torch.device, package: KernelPackage) -> None:
    """Raise FailedPrecondition where the device is unusable, as after an illegal memory access."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:
        raise FailedPrecondition(
            f"kernels: {package.name} left {device} unusable; uninstall it, or list other packages in kernels"
        ) from error


_Results = Iterator[tuple[Tensor, Tensor]]
"""Pairs of result and expected value."""


def _random(device: torch.device, *shape: int) -> Tensor:
    """Deterministic bfloat16 numbers between -1 and 1, without the random generators of the process."""
    numbers = torch.arange(float(torch.Size(shape).numel()), device=device).mul_(0.7).sin_()
    return numbers.view(shape).to(torch.bfloat16)


def _try_triton(device: torch.device) -> _Results:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    x = _random(device, 1, 2, 64)
    out = torch.empty_like(x)
    triton_kernels.write_gelu(x, out)
    yield out, gelu(x.float(), approximate="tanh")


def _gemm_operands(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (128, 64), weight (192, 64), bias (192,) and uninitialized out (128, 192) of a GEMM."""
    x, weight, bias = _random(device, 128, 64), _random(device, 192, 64) / 8, _random(device, 192)
    return x, weight, bias, torch.empty(128, 192, dtype=x.dtype, device=device)


def _try_nvmath(device: torch.device) -> _Results:
    # An optional package for GPUs.
    from models.kernels import cublas_lt

    x, weight, bias, out = _gemm_operands(device)
    cublas_lt.linear_into(x, weight, bias, out, gelu=True)
    yield out, gelu(linear(x.float(), weight.float(), bias.float()), approximate="tanh")


def _try_quack(device: torch.device) -> _Results:
    # An optional package for GPUs, which takes seconds to import.
    from models.kernels import quack_epilogues

    x, weight, bias, out = _gemm_operands(device)
    quack_epilogues.gelu_into(x, weight, bias, out)
    yield out, gelu(linear(x.float(), weight.float(), bias.float()), approximate="tanh")


def _try_cuda_bindings(device: torch.device) -> _Results:
    streams = CopyStreams(device)
    source, copy = _random(device, 2, 16), torch.zeros(2, 16, dtype=torch.bfloat16, device=device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    streams.write_flag(streams.current, flag.data_ptr(), 1)
    streams.await_flag(streams.current, flag.data_ptr())
    streams.copy_rows(streams.current, copy.data_ptr(), source.data_ptr(), 32, 32, 2)
    yield copy, source
    yield flag, torch.ones_like(flag)


def _try_attention(
    plain: Callable[[Tensor, Tensor, Tensor], Tensor],
    with_lse: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[torch.device], _Results]:
    """Trial of an attention backend, without and with the log-sum-exp."""

    def run(device: torch.device) -> _Results:
        q, k, v = (_random(device, 1, tokens, 2, 128) for tokens in (128, 192, 192))
        wide_q, wide_k, wide_v = (each.float().transpose(1, 2) for each in (q, k, v))
        expected = scaled_dot_product_attention(wide_q, wide_k, wide_v).transpose(1, 2)
        yield plain(q, k, v), expected
        out, lse = with_lse(q, k, v)
        yield out, expected
        yield lse, (wide_q @ wide_k.transpose(2, 3) / 128**0.5).logsumexp(-1)

    return run


def _try_flash_attention_3(device: torch.device) -> _Results:
    yield from _try_attention(attention_backends.flash_attention_3, attention_backends.flash_attention_3_with_lse)(
        device
    )
    q, k, v = (_random(device, 1, 128, 2, 128) for _ in range(3))
    yield (
        attention_backends.flash_attention_3_into(q, k, v, torch.empty_like(q)),
        attention_backends.flash_attention_3(q, k, v),
    )


_TRIALS: Mapping[PackageName, Callable[[torch.device], _Results]] = {
    "triton": _try_triton,
    "nvmath-python": _try_nvmath,
    "quack-kernels": _try_quack,
    "cuda-bindings": _try_cuda_bindings,
    "fa3-fwd": _try_flash_attention_3,
    "flash-attn-4": _try_attention(attention_backends.flash_attention_4, attention_backends.flash_attention_4_with_lse),
    "flash-attn": _try_attention(attention_backends.flash_attention_2, attention_backends.flash_attention_2_with_lse),
}
