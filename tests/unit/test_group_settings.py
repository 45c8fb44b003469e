"""Invalid settings of worker groups are refused with exit code 2 before any process starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import FailedPrecondition, FleetError, InvalidInput
from models.catalog import ServedModel, open_model
from models.kernels.packages import AttentionChoice
from models.registry import load_registry
from services.denoising import __main__ as denoising
from services.denoising import launcher
from services.denoising.settings import DenoisingSettings, check_attention, check_group, head_sizes
from tiny_ltx2 import AUDIO_HEAD_SIZE, VIDEO_HEAD_SIZE, build_tiny_ltx2
from tiny_wan import build_tiny_wan_causal
from tiny_z_image import build_tiny_z_image
from toy_checkpoint import build_toy_checkpoint, toy_family


@pytest.fixture(scope="module")
def emoji() -> ServedModel:
    return open_model("emoji", load_registry())


def settings_of(**given: Any) -> DenoisingSettings:
    return DenoisingSettings(**{"model": "emoji", "redis": "unix:///x", "device": "cpu"} | given)


@pytest.mark.parametrize(
    ("given", "kind", "field", "message"),
    [
        ({"tp": 3}, InvalidInput, "tp", "4 attention heads; possible products: 1, 2, 4"),
        ({"tp": 2, "ulysses": 4}, InvalidInput, "ulysses", "2 x 4"),
        ({"tp": 0}, InvalidInput, "tp", "at least 1"),
        ({"cfg": 3}, InvalidInput, "cfg", "2 branches"),
        (
            {"tp": 2, "nnodes": 3},
            InvalidInput,
            "nnodes",
            "3 is not a divisor of the 2 ranks of tp=2 ulysses=1 ring=1 cfg=1",
        ),
        ({"tp": 2, "nnodes": 2}, InvalidInput, "rdzv_endpoint", "rdzv_endpoint: '' is not HOST:PORT"),
        (
            {"tp": 2, "nnodes": 2, "rdzv_endpoint": "a:x"},
            InvalidInput,
            "rdzv_endpoint",
            "rdzv_endpoint: 'a:x' is not HOST:PORT",
        ),
        ({"tp": 2, "node_rank": 1}, InvalidInput, "node_rank", "node_rank: 1 is not from 0 to 0"),
        (
            {"tp": 2, "rank_lost_seconds": 2.0},
            InvalidInput,
            "rank_lost_seconds",
            "at least three times rank_heartbeat_seconds",
        ),
        ({"tp": 2, "max_restarts": -1}, InvalidInput, "max_restarts", "-1 is not at least 0"),
        ({"tp": 2, "device": "cuda:1"}, InvalidInput, "device", "'cuda:1' is not auto, cpu or cuda"),
        ({"tp": 2, "device": "cuda"}, FailedPrecondition, "device", "2 ranks .* need one GPU each, but .* has 1"),
    ],
)
def test_invalid_groups_are_refused(
    emoji: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    kind: type[FleetError],
    field: str,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(kind, match=message) as caught:
        check_group(emoji, settings_of(**given))
    assert caught.value.field == field


def test_valid_groups_are_accepted(emoji: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_group(emoji, settings_of(tp=2, ulysses=2, ring=3, cfg=2))
    check_group(emoji, settings_of(tp=2, device="cuda"))
    spread = settings_of(tp=2, ulysses=2, nnodes=2, node_rank=1, rdzv_endpoint="[::1]:29500", device="cuda")
    check_group(emoji, spread)
    assert spread.ranks_per_node == 2


def test_a_model_without_a_plan_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with toy_family(tmp_path_factory.mktemp("plugins") / "toy") as plugins:
        toy = open_model(f"toy={build_toy_checkpoint(tmp_path_factory.mktemp('toy'))}", load_registry([plugins]))
        with pytest.raises(InvalidInput, match="has no parallel plan for denoising"):
            check_group(toy, settings_of(ulysses=2))


def test_a_ring_of_a_causal_model_is_refused(tmp_path: Path) -> None:
    causal = open_model(f"causal={build_tiny_wan_causal(tmp_path)}", load_registry())
    with pytest.raises(InvalidInput, match=r"ring: 2 is not 1; .* axes tp, ulysses") as caught:
        check_group(causal, settings_of(ring=2))
    assert caught.value.field == "ring"
    check_group(causal, settings_of(tp=2))
    check_group(causal, settings_of(ulysses=2))
    for wrong, field in (({"cfg": 2}, "cfg"), ({"tp": 3}, "tp")):
        with pytest.raises(InvalidInput) as caught:
            check_group(causal, settings_of(**wrong))
        assert caught.value.field == field


def test_an_invalid_group_exits_2_and_is_not_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("FLEET_")]:
        monkeypatch.delenv(name)

    started: list[object] = []

    def start(*arguments: object) -> int:
        started.append(arguments)
        return 0

    monkeypatch.setattr(launcher, "launch", start)
    flags = ["--model", "emoji", "--redis", "unix:///x", "--device", "cpu"]
    assert denoising.main([*flags, "--tp", "3"]) == 2
    assert capsys.readouterr().err.startswith("fleet serve denoising: tp x ulysses: 3 x 1 is not a divisor of")
    assert not started
    causal = ["--model", f"causal={build_tiny_wan_causal(tmp_path)}", *flags[2:]]
    capsys.readouterr()  # discards the progress bars of the checkpoint writer
    assert denoising.main([*causal, "--tp", "2", "--step-cache-threshold", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("fleet serve denoising: step_cache_threshold: 0.1 is not 0; Wan")
    assert not started
    assert denoising.main([*flags, "--tp", "2"]) == 0
    assert len(started) == 1


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (build_tiny_wan_causal, {16}),
        (build_tiny_z_image, {16}),
        (build_tiny_ltx2, {VIDEO_HEAD_SIZE, AUDIO_HEAD_SIZE}),
    ],
)
def test_head_sizes_are_read_from_the_config(tmp_path: Path, build: Callable[[Path], Path], expected: set[int]) -> None:
    model = open_model(f"m={build(tmp_path)}", load_registry())
    assert set(head_sizes(model, "transformer")) == expected


@pytest.mark.parametrize("backend", ["cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_an_unsupported_attention_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: AttentionChoice
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = build_tiny_wan_causal(tmp_path) / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_head_dim": 12}))
    odd = open_model(f"odd={tmp_path}", load_registry())
    message = f"attention_backend: {backend} supports head sizes 8, 16, ... 128, and the model has 12; use auto"
    with pytest.raises(InvalidInput, match=re.escape(message)) as caught:
        check_attention(odd, settings_of(device="cuda", attention_backend=backend))
    assert caught.value.field == "attention_backend"
    with pytest.raises(
        InvalidInput, match=f"attention_backend: {backend} supports bfloat16, and dtype is float32; use auto"
    ):
        check_attention(odd, settings_of(device="cuda", dtype="float32", attention_backend=backend))
    for supported in ("auto", "sdpa"):
        check_attention(odd, settings_of(device="cuda", attention_backend=supported))
