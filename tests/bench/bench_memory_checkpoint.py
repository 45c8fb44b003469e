"""A checkpoint with weights in memory: our modules share the weights of Diffusers' pipeline.

The directory has every file of a small checkpoint; the config.json of each module with weights describes the module in
memory. The fleet opens the directory as a normal checkpoint; its loaders get the weights of the modules in memory.
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
    """Overwrite the config.json files of a small checkpoint with the modules' configs."""
    for name, module in modules.items():
        if isinstance(module, ConfigMixin):
            module.save_config(directory / name)
        else:
            config: Any = module.config
            config.save_pretrained(directory / name)


@contextmanager
def weights_in_memory(modules: Modules) -> Iterator[None]:
    """Make the loaders load modules from memory, by name, in the block.

    Modules of Diffusers and transformers are shared. A module that this project replaces is removed from `modules`, so
    that its weights are not stored twice when projections are fused.
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
    """Weights of a module by name, with the interface of an open safetensors file."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = module.state_dict()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    """A tensor with the interface of a safetensors slice."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _SAFETENSORS_DTYPES[str(self._tensor.dtype)]

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]
