"""The table of attention backends, and adapters against fake packages with the documented signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from fake_kernel_packages import FLASH_ATTN_2, FLASH_ATTN_4, install
from kernel_modules import fresh_imports
from models.kernels import attention as entry
from models.kernels.attention_table import choose_backend
from models.kernels.packages import (
    ATTENTION_PACKAGES,
    PACKAGES,
    AttentionBackend,
    AttentionChoice,
    Capability,
    KernelChoice,
    TrialOutcome,
    record,
)

HOPPER = (9, 0)
LARGE = 24 * 4608
"""Attention work, in heads x tokens, above every bound of the table."""
KEYS = 77
"""Number of key tokens, above the smallest number that each backend supports."""


@pytest.fixture
def backend(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AttentionBackend]:
    """Name of the backend that the entry point selects for all inputs; its fake package is installed."""
    name: AttentionBackend = request.param
    module, source = {"flash_attn_2": ("flash_attn", FLASH_ATTN_2), "flash_attn_4": ("flash_attn.cute", FLASH_ATTN_4)}[
        name
    ]
    install(tmp_path, ATTENTION_PACKAGES[name], "1", module, source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(entry, "_backend_for", lambda *_: name)
    with fresh_imports("flash_attn"):
        yield name


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.bfloat16)


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention outputs (B, L, H, K) and log-sum-exp (B, L, H), in float32."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float()), scores.logsumexp(-1).transpose(1, 2)


WITH_EACH_ADAPTER = pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_4"], indirect=True)


@WITH_EACH_ADAPTER
@pytest.mark.usefixtures("backend")
def test_an_adapter_matches_reference_attention() -> None:
    q, keys_and_values = random(2, 5, 3, 16), random(2, 7, 6, 16)
    k, v = keys_and_values.chunk(2, dim=2)
    expected, _ = reference_attention(q, k, v)
    torch.testing.assert_close(entry.attention(q, k, v).float(), expected, rtol=1e-2, atol=1e-2)
    wide = torch.zeros(2, 5, 6, 16, dtype=torch.bfloat16)
    entry.attention(q, k, v, out=wide[:, :, 3:])
    torch.testing.assert_close(wide[:, :, 3:].float(), expected, rtol=1e-2, atol=1e-2)
    assert not wide[:, :, :3].any()


@WITH_EACH_ADAPTER
@pytest.mark.usefixtures("backend")
def test_an_adapter_returns_the_log_sum_exp_for_ring_merges() -> None:
    q, k, v = random(2, 5, 3, 16), random(2, 8, 3, 16), random(2, 8, 3, 16)
    expected, lse = reference_attention(q, k, v)
    one, other = (entry.attention_with_lse(q, k[:, rows], v[:, rows]) for rows in (slice(0, 3), slice(3, None)))
    assert all(part[1].shape == (2, 5, 3) and part[1].dtype == torch.float32 for part in (one, other))
    out, merged = entry.merge_attention(one, other, torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(merged, lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("choice", "broken", "compiling", "expected"),
    [
        ("auto", "", False, "flash_attn_3"),
        ("auto", "E", False, "cudnn"),
        ("flash_attn_4", "", False, "flash_attn_4"),
        ("flash_attn_4", "", True, "sdpa"),
        ("cudnn", "", False, "cudnn"),
    ],
)
def test_the_entry_point_combines_setting_package_outcomes_and_table(
    monkeypatch: pytest.MonkeyPatch, choice: AttentionChoice, broken: str, compiling: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: HOPPER)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    q = cast(Tensor, SimpleNamespace(is_cuda=True, shape=(1, 4608, 24, 128), dtype=torch.bfloat16, device="cuda:0"))
    (package,) = (each for each in PACKAGES if each.name == "fa3-fwd")
    with fresh_imports():
        record(KernelChoice(attention=choice), [TrialOutcome(package, "1", broken)])
        assert entry._backend_for(q, q) == expected


def installed(*names: str) -> Callable[[str], bool]:
    return lambda name: name in names


@pytest.mark.parametrize(
    ("work", "package", "expected"),
    [
        (24 * 4608, "fa3-fwd", "flash_attn_3"),
        (24 * 4296, "fa3-fwd", "flash_attn_3"),
        (6 * 32760, "fa3-fwd", "flash_attn_3"),
        (12 * 4608, "fa3-fwd", "flash_attn_3"),
        (12 * 4296, "fa3-fwd", "flash_attn_3"),
        (24 * 1536, "fa3-fwd", "cudnn"),
        (24 * 4608, "flash-attn-4", "cudnn"),
        (24 * 4608, "", "cudnn"),
    ],
)
def test_the_table_names_the_fastest_backend_on_hopper(work: int, package: str, expected: str) -> None:
    assert choose_backend(HOPPER, torch.bfloat16, work, KEYS, 128, installed(package)) == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_ampere_and_ada_prefer_an_installed_flash_attn(capability: Capability) -> None:
    assert choose_backend(capability, torch.bfloat16, 1, KEYS, 128, installed("flash-attn")) == "flash_attn_2"
    assert choose_backend(capability, torch.bfloat16, LARGE, KEYS, 64, installed("flash-attn")) == "flash_attn_2"
    assert choose_backend(capability, torch.bfloat16, LARGE, KEYS, 128, installed("fa3-fwd", "flash-attn-4")) == "sdpa"


@pytest.mark.parametrize("capability", [(10, 0), (10, 3)])
def test_blackwell_prefers_flash_attn_4(capability: Capability) -> None:
    assert choose_backend(capability, torch.bfloat16, LARGE, KEYS, 128, installed("flash-attn-4")) == "flash_attn_4"
    assert choose_backend(capability, torch.bfloat16, LARGE, KEYS, 128, installed("fa3-fwd", "flash-attn")) == "sdpa"


@pytest.mark.parametrize("choice", ["sdpa", "cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_a_setting_overrides_the_table(choice: AttentionChoice) -> None:
    assert choose_backend(HOPPER, torch.bfloat16, 1, KEYS, 128, installed("fa3-fwd"), choice) == choice
    assert choose_backend((7, 5), torch.bfloat16, LARGE, KEYS, 128, installed(), choice) == choice
    assert choose_backend(HOPPER, torch.float32, LARGE, KEYS, 128, installed("fa3-fwd"), choice) == "sdpa"


@pytest.mark.parametrize("choice", ["auto", "cudnn"])
def test_a_single_key_falls_back_to_sdpa(choice: AttentionChoice) -> None:
    """cuDNN does not support a single key, and LTX-Video encodes an empty prompt as one token."""
    assert choose_backend(HOPPER, torch.bfloat16, 24, 1, 128, installed("fa3-fwd"), choice) == "sdpa"
    assert choose_backend(HOPPER, torch.bfloat16, 24, 2, 128, installed("fa3-fwd"), choice) == "cudnn"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size"),
    [
        ((7, 5), torch.bfloat16, 128),
        ((9, 0), torch.float32, 128),
        ((9, 0), torch.bfloat16, 256),
        ((9, 0), torch.bfloat16, 12),
    ],
)
def test_inputs_that_no_backend_supports_use_sdpa(capability: Capability, dtype: torch.dtype, head_size: int) -> None:
    assert choose_backend(capability, dtype, 10**6, KEYS, head_size, lambda _: True) == "sdpa"
