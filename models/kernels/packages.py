"""Optional kernel packages: their names, their replacements, and the outcome of their trial in this process.

`models.kernels.trials` tries every package once, when a GPU worker starts, and records the outcomes here. Layers ask
is_usable(): no package is probed again at its first use, and all facts about packages enter the numerics fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from common.errors import InvalidInput

PackageName = Literal[
    "triton", "nvmath-python", "quack-kernels", "cuda-bindings", "fa3-fwd", "flash-attn-4", "flash-attn"
]
"""Names on PyPI."""

PackageChoice = Literal["auto", "none", PackageName]
"""Values of the setting `kernels`."""

AttentionBackend = Literal["sdpa", "cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"]
AttentionChoice = Literal["auto", AttentionBackend]
"""Values of the setting `attention_backend`."""

Capability = tuple[int, int]
"""Compute capability of a GPU, such as (9, 0)."""


@dataclass(frozen=True)
class KernelPackage:
    """An optional package: name on PyPI, module to import, replacement where it is absent or broken.

    `capabilities` are the GPUs on which our code uses the package; empty means all.
    """

    name: PackageName
    module: str
    replacement: str
    capabilities: tuple[Capability, ...] = ()

    def is_for(self, capability: Capability) -> bool:
        """Whether our code uses the package on GPUs of a compute capability."""
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

    `auto` uses every package that works. A package that is named must work; without `auto` the others stay unused.
    """

    packages: tuple[PackageChoice, ...] = ("auto",)
    attention: AttentionChoice = "auto"

    def __post_init__(self) -> None:
        if "none" in self.packages and len(self.packages) > 1:
            given = ",".join(self.packages)
            raise InvalidInput(f"kernels: {given} is not one choice; give none alone, or leave it out", field="kernels")

    @property
    def required(self) -> tuple[PackageName, ...]:
        """Packages that a setting names: the worker does not start without them."""
        named = [package.name for package in PACKAGES if package.name in self.packages]
        if self.attention in ATTENTION_PACKAGES and (needed := ATTENTION_PACKAGES[self.attention]) not in named:
            named.append(needed)
        return tuple(named)

    def setting_of(self, name: PackageName) -> str:
        """The setting that requires a package, as `name: value`."""
        return f"kernels: {name}" if name in self.packages else f"attention_backend: {self.attention}"


@dataclass(frozen=True)
class Outcome:
    """Result of the trial of an installed package; `error` is empty where the package works."""

    package: KernelPackage
    version: str
    error: str = ""

    @property
    def fact(self) -> str:
        """A line of the numerics fingerprint. The error is left out: its text may differ between processes."""
        return f"{self.package.name} {self.version} {'unusable' if self.error else 'in use'}"


class _NotTried(RuntimeError):
    """A layer asked for a package before the trials."""

    def __init__(self) -> None:
        super().__init__("kernel packages have not been tried; call models.kernels.trials.try_packages() first")


class _Tried:
    """What was tried in this process: a process computes on one kind of GPU with one choice."""

    choice = KernelChoice()
    outcomes: tuple[Outcome, ...] | None = None
    usable: frozenset[PackageName] | None = None


def record(choice: KernelChoice, outcomes: Iterable[Outcome] | None) -> None:
    """Record the outcomes of the trials; None forgets them."""
    _Tried.choice = choice
    _Tried.outcomes = None if outcomes is None else tuple(outcomes)
    _Tried.usable = None if outcomes is None else frozenset(each.package.name for each in _tried() if not each.error)


def outcomes() -> tuple[Outcome, ...]:
    """Outcomes of the installed packages that were tried; empty on a CPU, where none is."""
    return _Tried.outcomes or ()


def is_usable(name: PackageName) -> bool:
    """Whether a package was tried and works. Raises RuntimeError before try_packages() has run in this process."""
    if _Tried.usable is None:
        raise _NotTried
    return name in _Tried.usable


def chosen_attention() -> AttentionChoice:
    """The attention backend that a setting names, or auto."""
    return _Tried.choice.attention


def package_facts() -> list[str]:
    """Lines of the numerics fingerprint: packages with version and outcome, and the attention backend.

    Raises RuntimeError as is_usable().
    """
    return [*(each.fact for each in _tried()), f"attention {chosen_attention()}"]


def _tried() -> tuple[Outcome, ...]:
    if _Tried.outcomes is None:
        raise _NotTried
    return _Tried.outcomes
