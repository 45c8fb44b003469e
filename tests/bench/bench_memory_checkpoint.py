"""A checkpoint whose weights are in memory: ours are loaded from the modules of Diffusers' pipeline, without copies.

The directory has every file of a small checkpoint; config.json of each module with weights is that of the module in
memory. The fleet opens it as any other, and its loaders get the weights of the modules in place of those in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from diffusers import ConfigMixin
from torch import Tensor, nn

from models import loader, weights

Modules = dict[str, nn.Module]
_SAFETENSORS_DTYPES = {"torch.bfloat16": "BF16", "torch.float32": "F32"}


def write_configs(directory: Path, modules: Mapping[str, nn.Module]) -> None:
    """Overwrite the modules' config.json in a small checkpoint."""
    for name, module in modules.items():
        if isinstance(module, ConfigMixin):
            module.save_config(directory / name)
        else:
            config: Any = module.config
            config.save_pretrained(directory / name)


@contextmanager
def weights_in_memory(modules: Modules) -> Iterator[None]:
    """Load modules from memory, by name, while the context is active.

    Modules of Diffusers and transformers are shared as they are. A module that our own class replaces is removed from
    `modules`, so that its weights are not held twice where our layers join them.
    """
    from_files = loader._from_pretrained

    def from_pretrained(checkpoint: Any, name: str, options: Mapping[str, Any], class_name: str = "") -> Any:
        if name not in modules:
            return from_files(checkpoint, name, options, class_name)
        return (modules[name], {}) if "output_loading_info" in options else modules[name]

    @contextmanager
    def open_weights(path: Path, **_: str) -> Iterator[_ModuleWeights]:
        yield _ModuleWeights(modules.pop(path.parent.name))

    with ExitStack() as stack:
        stack.enter_context(patch.object(loader, "_from_pretrained", from_pretrained))
        stack.enter_context(patch.object(weights, "safe_open", open_weights))
        yield


class _ModuleWeights:
    """The weights of a module by name, as an open safetensors file returns them."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = module.state_dict()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    """A tensor as safetensors describes it before it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _SAFETENSORS_DTYPES[str(self._tensor.dtype)]

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]
