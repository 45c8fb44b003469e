"""Optional kernel packages: names, replacements, and the outcomes of their trials in this process.

When a GPU worker starts, `models.kernels.trials` tries the packages that its settings and its GPU select, and records
the outcomes here. Layers call is_usable() and never probe a package themselves. The outcomes are part of the numerics
fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from common.errors import InvalidInput

PackageName = Literal[
    "triton", "nvmath-python", "quack-kernels", "cuda-bindings", "fa3-fwd", "flash-attn-4", "flash-attn"
]
"""Package names on PyPI."""

PackageChoice = Literal["auto", "none", PackageName]
"""Values of the setting `kernels`."""

AttentionBackend = Literal["sdpa", "cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"]
AttentionChoice = Literal["auto", AttentionBackend]
"""Values of the setting `attention_backend`."""

Capability = tuple[int, int]
"""Compute capability of a GPU, such as (9, 0)."""


@dataclass(frozen=True)
class KernelPackage:
    """An optional package: name on PyPI, module to import, replacement if the package is unusable.

    `capabilities` are the compute capabilities of the GPUs on which the package can be used; empty: all GPUs.
    """

    name: PackageName
    module: str
    replacement: str
    capabilities: tuple[Capability, ...] = ()

    def is_for(self, capability: Capability) -> bool:
        """Whether the package can be used on GPUs of a compute capability."""
        return not self.capabilities or capability in self.capabilities


_HOPPER: Capability = (9, 0)
_AMPERE_AND_ADA: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9))
_BLACKWELL: tuple[Capability, ...] = ((10, 0), (10, 3))
_OTHER_ATTENTION = "cuDNN or PyTorch attention"

PACKAGES: tuple[KernelPackage, ...] = (
    KernelPackage("triton", "triton", "PyTorch operators"),
    KernelPackage("nvmath-python", "nvmath.bindings.cublasLt", "PyTorch GEMM and separate passes"),
    KernelPackage("quack-kernels", "quack", "cuBLASLt or PyTorch GEMM and separate passes", (_HOPPER,)),
    KernelPackage("cuda-bindings", "cuda.bindings.driver", "NCCL in place of copies between GPUs"),
    KernelPackage("fa3-fwd", "fa3_fwd_interface", _OTHER_ATTENTION, (_HOPPER,)),
    KernelPackage("flash-attn-4", "flash_attn.cute", _OTHER_ATTENTION, (_HOPPER, *_BLACKWELL)),
    KernelPackage("flash-attn", "flash_attn", _OTHER_ATTENTION, (*_AMPERE_AND_ADA, _HOPPER)),
)

ATTENTION_PACKAGES: dict[AttentionBackend, PackageName] = {
    "flash_attn_2": "flash-attn",
    "flash_attn_3": "fa3-fwd",
    "flash_attn_4": "flash-attn-4",
}
"""The package of each attention backend that needs one."""


@dataclass(frozen=True)
class KernelChoice:
    """The settings `kernels` and `attention_backend` of a worker.

    `auto` uses the packages of layers and of the attention table that work. A package that a setting names must work.
    Without `auto`, all other packages are unused. Raises InvalidInput for `none` together with another value.
    """

    packages: tuple[PackageChoice, ...] = ("auto",)
    attention: AttentionChoice = "auto"

    def __post_init__(self) -> None:
        if "none" in self.packages and len(self.packages) > 1:
            given = ",".join(self.packages)
            raise InvalidInput(f"kernels: {given} is not one choice; use none alone, or remove it", field="kernels")

    @property
    def required(self) -> tuple[PackageName, ...]:
        """Packages that a setting names. The worker does not start without them."""
        named = [package.name for package in PACKAGES if package.name in self.packages]
        if self.attention in ATTENTION_PACKAGES and (needed := ATTENTION_PACKAGES[self.attention]) not in named:
            named.append(needed)
        return tuple(named)

    def setting_of(self, name: PackageName) -> str:
        """The setting that requires a package, as `setting: value`."""
        return f"kernels: {name}" if name in self.packages else f"attention_backend: {self.attention}"


@dataclass(frozen=True)
class TrialOutcome:
    """Result of the trial of an installed package; `error` is empty where the package works."""

    package: KernelPackage
    version: str
    error: str = ""

    @property
    def fact(self) -> str:
        """Line of the numerics fingerprint. It excludes the error, whose text may differ between processes."""
        return f"{self.package.name} {self.version} {'unusable' if self.error else 'in use'}"


class _NotTried(RuntimeError):
    """Error for a call of is_usable() or a similar function before the trials."""

    def __init__(self) -> None:
        super().__init__("kernel packages have not been tried; call models.kernels.trials.try_packages() first")


class _Tried:
    """Outcomes of the trials in this process, which has one type of GPU and one KernelChoice."""

    choice = KernelChoice()
    outcomes: tuple[TrialOutcome, ...] | None = None
    usable: frozenset[PackageName] | None = None


def record(choice: KernelChoice, outcomes: Iterable[TrialOutcome] | None) -> None:
    """Record the outcomes of the trials; None discards them."""
    _Tried.choice = choice
    _Tried.outcomes = None if outcomes is None else tuple(outcomes)
    _Tried.usable = None if outcomes is None else frozenset(each.package.name for each in _tried() if not each.error)


def outcomes() -> tuple[TrialOutcome, ...]:
    """Outcomes of the tried packages; empty on a CPU, where no package is tried."""
    return _Tried.outcomes or ()


def is_usable(name: PackageName) -> bool:
    """Whether a package passed its trial. Raises RuntimeError before try_packages() has run in this process."""
    if _Tried.usable is None:
        raise _NotTried
    return name in _Tried.usable


def chosen_attention() -> AttentionChoice:
    """Value of the setting `attention_backend`."""
    return _Tried.choice.attention


def package_facts() -> list[str]:
    """Lines of the numerics fingerprint: packages with version and outcome, and the attention backend.

    Raises RuntimeError before try_packages() has run in this process.
    """
    return [*(each.fact for each in _tried()), f"attention {chosen_attention()}"]


def _tried() -> tuple[TrialOutcome, ...]:
    if _Tried.outcomes is None:
        raise _NotTried
    return _Tried.outcomes
