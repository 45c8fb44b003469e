"""Operations with several implementations, and the backends that determine the bits of a result.

BACKENDS is the only list of implementations: register() refuses any other backend, and facts() reads the same list, so
that no backend is missing from the numerics fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from models.kernels.packages import PackageName, is_usable, package_facts

OperationName = Literal[
    "attention",
    "attention with log-sum-exp",
    "merge of attention",
    "gemm",
    "gemm with gelu",
    "gemm with gated addition",
    "gemm with norm and rotation",
    "norm and modulation",
    "gated addition, norm and modulation",
    "norm and rotation",
    "gelu",
    "silu gate",
    "quantization",
    "channel norm and silu",
]

Backends = Mapping[str, PackageName | None]
"""Package of each backend; None: the backend is part of PyTorch."""

_ATTENTION: Backends = {
    "flash_attn_2": "flash-attn",
    "flash_attn_3": "fa3-fwd",
    "flash_attn_4": "flash-attn-4",
    "cudnn": None,
    "sdpa": None,
}
_GEMM: Backends = {"cublas_lt": "nvmath-python", "float8": None, "torch": None}
_QUACK: Backends = {"quack": "quack-kernels"}
_TRITON: Backends = {"triton": "triton", "torch": None}

BACKENDS: Mapping[OperationName, Backends] = {
    "attention": _ATTENTION,
    "attention with log-sum-exp": _ATTENTION,
    "merge of attention": _TRITON,
    "gemm": _GEMM,
    "gemm with gelu": {**_QUACK, **_GEMM, "torch_epilogue": None},
    "gemm with gated addition": _QUACK,
    "gemm with norm and rotation": _QUACK,
    "norm and modulation": _TRITON,
    "gated addition, norm and modulation": _TRITON,
    "norm and rotation": _TRITON,
    "gelu": _TRITON,
    "silu gate": _TRITON,
    "quantization": _TRITON,
    "channel norm and silu": _TRITON,
}

F = TypeVar("F", bound=Callable[..., Any])


class Operation(Generic[F]):
    """The implementations of one operation, by backend."""

    def __init__(self, name: OperationName) -> None:
        self.name = name
        self._backends = BACKENDS[name]
        self._implementations: dict[str, F] = {}

    def register(self, backend: str) -> Callable[[F], F]:
        """Decorator that registers the implementation of a backend. Raises ValueError for a backend not in BACKENDS."""
        if backend not in self._backends:
            raise ValueError(f"{self.name}: {backend} is not in BACKENDS; add it there, so that facts() has it")

        def add(implementation: F) -> F:
            self._implementations[backend] = implementation
            return implementation

        return add

    def __getitem__(self, backend: str) -> F:
        """The implementation of a backend."""
        return self._implementations[backend]

    def is_usable(self, backend: str) -> bool:
        """Whether the backend's package passed its trial. Raises RuntimeError before the trials."""
        package = self._backends[backend]
        return package is None or is_usable(package)

    def for_device_of(self, x: Tensor) -> F:
        """Triton's implementation for a CUDA tensor if Triton is usable, else PyTorch's."""
        return self._implementations["triton" if x.is_cuda and self.is_usable("triton") else "torch"]

    def registered(self) -> frozenset[str]:
        """The backends that have an implementation."""
        return frozenset(self._implementations)


def facts() -> list[str]:
    """Lines of the numerics fingerprint: packages with version and outcome, then usable backends.

    Raises RuntimeError before try_packages() has run in this process.
    """
    lines = package_facts()
    for operation, backends in BACKENDS.items():
        usable = [backend for backend, package in backends.items() if package is None or is_usable(package)]
        lines.append(f"{operation}: {' '.join(usable)}")
    return lines
