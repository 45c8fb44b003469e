"""Finds the safetensors files of one module: single files, shards and Diffusers variants.

File names of Diffusers 0.42 and transformers 5, with STEM `diffusion_pytorch_model` or `model`: STEM.safetensors and
STEM.VARIANT.safetensors; the index of shards is STEM.safetensors.index.json or STEM.safetensors.index.VARIANT.json
(STEM.safetensors.VARIANT.index.json in older Diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import CheckpointError
from common.json_file import check_link, is_listed, read_json
from common.safetensors_header import SafetensorsHeader, read_header

_STEMS = {"transformers": ("model", "diffusion_pytorch_model")}
_OTHER_STEMS = ("diffusion_pytorch_model", "model")
_SINGLE = re.compile(r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<variant>[^.]+))?\.safetensors")
_INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)\.safetensors(\.(?P<older>[^.]+))?\.index(\.(?P<variant>[^.]+))?\.json"
)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\..*")
_ANY_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
# Order of preference if there are only variants. bfloat16 before float16, because it has the range of float32.
_PREFERRED_VARIANTS = ("fp32", "bf16", "fp16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of a module: headers by file, sorted by name, the shard index, and the variant.

    `variant` is the argument `variant` of from_pretrained(); None for files without a variant.
    """

    headers: Mapping[Path, SafetensorsHeader] = field(default_factory=dict)
    index: Path | None = None
    variant: str | None = None


def read_weights(folder: Path, library: str) -> WeightFiles:
    """Find a module's weight files and read their headers; empty if there are none. Raises CheckpointError.

    `library` is the module's library in model_index.json. If a directory contains a single file and shards,
    transformers reads the single file and Diffusers the shards.
    """
    for stem in _STEMS.get(library, _OTHER_STEMS):
        candidates = _candidates(folder, stem)
        if not candidates:
            continue
        variant = _choose_variant(folder, candidates)
        single, index = candidates[variant].get("single"), candidates[variant].get("index")
        if single is not None and (index is None or library == "transformers"):
            check_link(single)
            return WeightFiles({single: read_header(single)}, variant=variant)
        assert index is not None, "a candidate has a file or an index"
        return WeightFiles(_read_shards(index), index, variant)
    return WeightFiles()


def no_weights(folder: Path, library: str) -> CheckpointError:
    """Return the error for a module without safetensors files, with the weight files that exist instead."""
    names = " or ".join(f"{stem}.safetensors" for stem in _STEMS.get(library, _OTHER_STEMS))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} contains only pickled weights ({', '.join(pickles[:3])}), which can run code; {names} is "
            "required (save_pretrained() of Diffusers writes it)"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    found = f"; {', '.join(others[:3])} has another name" if others else ""
    return CheckpointError(f"{folder} contains no weights{found}; {names} is required, with or without a variant")


def is_weight_file(name: str) -> bool:
    """Return whether a file is a weight file or a shard index."""
    return name.endswith((".safetensors", ".gguf", *_PICKLES)) or _ANY_INDEX.fullmatch(name) is not None


def is_file_name(text: str) -> bool:
    """Return whether a string is a valid name of a single file."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return size <= _LONGEST_NAME and "\0" not in text and Path(text).name == text


def _candidates(folder: Path, stem: str) -> dict[str | None, dict[str, Path]]:
    """Return the single file and the shard index of a stem, by variant. Includes dangling links."""
    found: dict[str | None, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        single, index = _SINGLE.fullmatch(path.name), _INDEX.fullmatch(path.name)
        match = single or index
        if match is None or match["stem"] != stem or _SHARD.fullmatch(path.name) or not is_listed(path):
            continue
        variant = match["variant"] or (index and index["older"])
        found.setdefault(variant, {}).setdefault("single" if single else "index", path)
    return found


def _choose_variant(folder: Path, candidates: Mapping[str | None, object]) -> str | None:
    """Return the variant to load: the only variant, else None (no variant), else by _PREFERRED_VARIANTS."""
    if len(candidates) == 1:
        return next(iter(candidates))
    for variant in (None, *_PREFERRED_VARIANTS):
        if variant in candidates:
            return variant
    names = ", ".join(sorted(map(str, candidates)))
    raise CheckpointError(
        f"{folder} contains the variants {names} and no weights without a variant; retain one of them, "
        f"or add {', '.join(_PREFERRED_VARIANTS)} or weights without a variant, which take precedence"
    )


def _read_shards(index: Path) -> dict[Path, SafetensorsHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_file_name(file):
            raise CheckpointError(f"{index}: {tensor}: {file!r} is not a file name; write it without directories")
    headers: dict[Path, SafetensorsHeader] = {}
    for path in sorted({index.parent / file for file in weight_map.values()}):
        check_link(path)
        if not path.is_file():
            raise CheckpointError(f"{index} names {path.name}, which is missing")
        headers[path] = read_header(path)
    for tensor, file in weight_map.items():
        if tensor not in headers[index.parent / file].tensors:
            raise CheckpointError(f"{index} assigns {tensor} to {file}, which does not contain it")
    return headers
