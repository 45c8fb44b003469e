"""The call path from DenoisingStage.run() to attention() spans few files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor

from models.kernels.attention import attention as attend
from models.layers import attention as layer
from parallel_cases import FAMILIES, make_case

ROOT = Path(__file__).resolve().parents[2]

# Generic wrappers, which a reader of the call path skips.
WRAPPERS = {"run_blocks", "run_joint_blocks", "run_modulated_blocks", "entered"}

NUM_FILES = {
    "flux": 4,
    "wan": 4,
    "ltx-video": 4,
    "z-image": 4,
    "glm-image": 4,
    # Joint attention is a separate layer.
    "qwen-image": 5,
    # The blocks of these DiTs are in a second file.
    "ltx2": 5,
    "hunyuan-video": 5,
}


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame, its caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def files_to_read() -> list[str]:
    """Files of the call stack, from a denoising stage's run() to the caller of the patched attention()."""
    files: list[str] = []
    for frame in frames_from(sys._getframe(2)):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if path.is_relative_to(ROOT / "models") and name not in WRAPPERS:
            files.append(str(path.relative_to(ROOT)))
        if name == "run" and path.parent.name == "stages":
            return list(dict.fromkeys(reversed(files)))
    return []


@pytest.mark.parametrize("family", NUM_FILES)
def test_the_call_path_to_attention_spans_the_listed_number_of_files(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    paths: list[list[str]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if files := files_to_read():
            paths.append(files)
        return attend(q, k, v, mask, out)

    monkeypatch.setattr(layer, "attention", attention)
    make_case(FAMILIES[family], tmp_path)
    shortest = min(paths, key=len)
    assert shortest[-1] == "models/layers/attention.py"
    assert len(shortest) == NUM_FILES[family], shortest
