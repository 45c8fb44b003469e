"""Finds the safetensors files of one module: plain ones, shards, and the variants that Diffusers names.

Names, as Diffusers 0.42 and transformers 5 write and read them, with STEM `diffusion_pytorch_model` or `model`:
STEM.safetensors and STEM.VARIANT.safetensors; with shards, STEM.safetensors.index.json and
STEM.safetensors.index.VARIANT.json (STEM.safetensors.VARIANT.index.json in older Diffusers), which name the shards.
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
# Of several variants without a plain file: bfloat16 before float16, because it has the range of float32.
_PREFERRED_VARIANTS = ("fp32", "bf16", "fp16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class WeightFiles:
    """A module's weights: headers by file in the order of their names, the shard index, and the variant.

    `variant` is None for plain files, else what from_pretrained() takes as `variant`.
    """

    headers: Mapping[Path, SafetensorsHeader] = field(default_factory=dict)
    index: Path | None = None
    variant: str | None = None


def read_weights(folder: Path, library: str) -> WeightFiles:
    """Find a module's weights and read their headers; no headers where there are none. Raises CheckpointError.

    `library` is that of model_index.json: where one file and shards lie side by side, transformers reads the file and
    Diffusers the shards.
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
    """The error for a module without safetensors files; names what lies there instead."""
    names = " or ".join(f"{stem}.safetensors" for stem in _STEMS.get(library, _OTHER_STEMS))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which are not read because they can run "
            f"code; {names} is needed (save_pretrained() of Diffusers writes it)"
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    found = f"; {', '.join(others[:3])} has another name" if others else ""
    return CheckpointError(f"{folder} holds no weights{found}; {names} is needed, plain or as a variant")


def is_weight_file(name: str) -> bool:
    """Whether a file is one of weights, or lists them: it counts for a fingerprint only if it is read."""
    return name.endswith((".safetensors", ".gguf", *_PICKLES)) or _ANY_INDEX.fullmatch(name) is not None


def is_file_name(text: str) -> bool:
    """Whether a file system could have it as the name of one file."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return size <= _LONGEST_NAME and "\0" not in text and Path(text).name == text


def _candidates(folder: Path, stem: str) -> dict[str | None, dict[str, Path]]:
    """By variant, the single file and the shard index of that stem. Links without target count."""
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
    """The plain files; else the only variant; else the first of _PREFERRED_VARIANTS."""
    if len(candidates) == 1:
        return next(iter(candidates))
    for variant in (None, *_PREFERRED_VARIANTS):
        if variant in candidates:
            return variant
    names = ", ".join(sorted(map(str, candidates)))
    raise CheckpointError(
        f"{folder} holds the variants {names} and no plain weights; keep one of them, "
        f"or add {', '.join(_PREFERRED_VARIANTS)} or plain ones, which are preferred"
    )


def _read_shards(index: Path) -> dict[Path, SafetensorsHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not is_file_name(file):
            raise CheckpointError(f"{index}: {tensor} must name a file of the same folder, but is {file!r}")
    headers: dict[Path, SafetensorsHeader] = {}
    for path in sorted({index.parent / file for file in weight_map.values()}):
        check_link(path)
        if not path.is_file():
            raise CheckpointError(f"{index} names {path.name}, which is missing")
        headers[path] = read_header(path)
    for tensor, file in weight_map.items():
        if tensor not in headers[index.parent / file].tensors:
            raise CheckpointError(f"{index} says that {file} holds {tensor}, but it does not")
    return headers
