"""Error messages for paths that are not Diffusers directories. They state the actual content and the path to use."""

from __future__ import annotations

from pathlib import Path

from common.errors import CheckpointError
from common.json_file import read_json
from common.safetensors_header import read_header

_INDEX_FILE = "model_index.json"
_ONE_FILE = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin")
_LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
_LORA_MARKS = ("lora_A", "lora_B", "lora_down", "lora_up")
_CACHE_PREFIX = "models--"
_MOST_NAMED = 5

_RIGHT = f"a model is a Diffusers directory with {_INDEX_FILE}"


def repository_of(path: Path) -> str | None:
    """Return ORG--NAME of a Hugging Face cache path models--ORG--NAME/snapshots/HASH; None otherwise."""
    if path.parent.name != "snapshots" or not path.parent.parent.name.startswith(_CACHE_PREFIX):
        return None
    return path.parent.parent.name.removeprefix(_CACHE_PREFIX) or None


def explain(path: Path) -> str:
    """Return the message for a path without model_index.json. Reads file names, JSON files and safetensors headers."""
    if path.is_file():
        return _explain_file(path)
    if not path.is_dir():
        return f"{path} is not a directory; {_RIGHT}"
    repository = path.parent if path.name == "snapshots" else path
    if (repository / "snapshots").is_dir() and repository.name.startswith(_CACHE_PREFIX):
        return _explain_repository(repository)
    for cache in (path, path / "hub"):
        if repositories := sorted(cache.glob(f"{_CACHE_PREFIX}*/snapshots")):
            return _explain_cache(cache, [each.parent for each in repositories])
    if lora := [name for name in _LORA_FILES if (path / name).exists()]:
        return _explain_lora(path, lora[0])
    if (path.parent / _INDEX_FILE).is_file():
        return f"{path} is one module of a checkpoint, which is {path.parent}; pass that directory"
    files = sorted(each for each in path.iterdir() if each.suffix in _ONE_FILE and each.is_file())
    if (path / "config.json").is_file():
        return f"{path} contains a single model ({_class_in(path / 'config.json')}) and no pipeline; {_RIGHT}"
    if files:
        return _explain_file(files[0], path)
    return f"{path} has no {_INDEX_FILE}, so it is not a Diffusers directory; {_RIGHT}"


def _explain_file(file: Path, folder: Path | None = None) -> str:
    """Return the message for a file, or for the directory that contains it."""
    if _is_lora(file):
        return _explain_lora(folder or file, file.name)
    subject = f"{file} is" if folder is None else f"{folder} has no {_INDEX_FILE}, and {file.name} in it is"
    if file.suffix not in _ONE_FILE:
        return f"{file} is a file; {_RIGHT}"
    return (
        f"{subject} a single-file checkpoint; {_RIGHT}. Convert it with the pipeline class of Diffusers: "
        f"from_single_file({str(file)!r}).save_pretrained(DIRECTORY)"
    )


def _explain_lora(path: Path, file: str) -> str:
    return (
        f"{path} contains LoRA weights ({file}), not a model; {_RIGHT}: load the LoRA into its base model with "
        f"Diffusers (load_lora_weights, fuse_lora), and save_pretrained() the result"
    )


def _explain_repository(repository: Path) -> str:
    """Return the message for a repository of the Hugging Face cache, with its snapshots."""
    whole = [str(each.parent) for each in sorted(repository.glob(f"snapshots/*/{_INDEX_FILE}"))]
    name = f"{repository} is a repository in the Hugging Face cache"
    if not whole:
        return f"{name}, and none of its snapshots has {_INDEX_FILE}; download it again, or another repository"
    if len(whole) == 1:
        return f"{name}; pass its snapshot {whole[0]}"
    return f"{name}; pass one of its snapshots: {', '.join(whole[:_MOST_NAMED])}"


def _explain_cache(cache: Path, repositories: list[Path]) -> str:
    snapshots = [str(each.parent) for path in repositories for each in sorted(path.glob(f"snapshots/*/{_INDEX_FILE}"))]
    if not snapshots:
        names = ", ".join(path.name for path in repositories[:_MOST_NAMED])
        return f"{cache} is the Hugging Face cache, and no snapshot in it has {_INDEX_FILE}; it holds {names}"
    return f"{cache} is the Hugging Face cache; pass a snapshot in it, such as {', '.join(snapshots[:_MOST_NAMED])}"


def _is_lora(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return False
    try:
        tensors = read_header(file).tensors
    except CheckpointError:
        return False
    return any(mark in name for name in tensors for mark in _LORA_MARKS)


def _class_in(config: Path) -> str:
    try:
        values = read_json(config)
    except CheckpointError:
        return "its config.json is not readable"
    architectures = values.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else values.get("_class_name")
    return str(named or "config.json names no class")
