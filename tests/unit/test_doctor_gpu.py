"""`fleet doctor`: driver, GPUs, kernel packages and attention, from fake facts of a GPU host."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from common.errors import FailedPrecondition
from doctor_lines import lines
from fake_kernel_packages import FLASH_ATTN_2, install
from models.kernels.attention_table import TABLE
from models.kernels.packages import PACKAGES, Capability, KernelChoice, TrialOutcome
from models.kernels.trials import outcomes_on
from services.cli import doctor, doctor_gpu, doctor_gpu_facts
from services.cli.doctor_gpu import (
    Gpu,
    GpuFacts,
    KernelTrial,
    NvidiaDriver,
    check_attention,
    check_gpus,
    check_kernels,
    read_driver,
    read_gpu_facts,
)
from services.cli.doctor_results import run_checks

GIB = 1 << 30
HOPPER: Capability = (9, 0)
H200 = Gpu("NVIDIA H200", "9.0", 140 * GIB, 139 * GIB)
HEALTHY = GpuFacts(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    driver=NvidiaDriver("580.65.06", "13.0"),
    gpus=[H200],
    trials=[KernelTrial("triton", "3.6.0", "PyTorch operators", "")],
    attention={"9.0": "cudnn, else sdpa"},
)
BROKEN = KernelTrial("fa3-fwd", "0.0.3", "cuDNN or PyTorch attention", "OSError: libcudart.so.12")


def test_a_healthy_gpu_host_is_reported() -> None:
    assert lines(check_gpus(HEALTHY)) == [
        "ok gpu: driver 580.65.06, which supports CUDA 13.0; torch 2.13.0+cu130 is built for CUDA 13.0",
        "ok gpu: cuda:0 is NVIDIA H200, compute capability 9.0, 140.0 GiB, 139.0 GiB free",
    ]
    assert lines(check_kernels(HEALTHY))[0] == "ok kernels: triton 3.6.0 loads and computes correctly"
    assert lines(check_attention(HEALTHY)) == ["ok attention: on compute capability 9.0: cudnn, else sdpa"]


def test_a_host_without_a_gpu_is_accepted_unless_the_device_is_cuda() -> None:
    facts = GpuFacts("2.13.0+cpu", "", NvidiaDriver())
    no_gpu = "ok gpu: no NVIDIA driver and no GPU: workers compute on the CPU in float32"
    assert lines(check_gpus(facts)) == [no_gpu]
    no_cuda = "error gpu: device is cuda:1, and torch sees no GPU -> set device to auto or cpu, or attach a GPU"
    assert lines(check_gpus(facts, "cuda:1")) == [no_gpu, no_cuda]
    assert not lines(check_kernels(facts))
    assert not lines(check_attention(facts))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"torch": "2.13.0+cpu", "torch_cuda": "", "gpus": []},
            "warning gpu: driver 580.65.06 is installed, but torch 2.13.0+cpu is built without CUDA -> install torch",
        ),
        (
            {"driver": NvidiaDriver("535.1", "12.2"), "gpus": []},
            "error gpu: driver 535.1 supports CUDA 12.2, but torch 2.13.0+cu130 is built for CUDA 13.0 -> update the ",
        ),
        (
            {"gpus": [], "cuda_error": "CUDA unknown error"},
            "error gpu: driver 580.65.06 is installed, but torch 2.13.0+cu130 sees no GPU "
            "(CUDA_VISIBLE_DEVICES is ''): CUDA unknown error -> check nvidia-smi",
        ),
    ],
)
def test_a_driver_that_torch_cannot_use_is_reported(
    changes: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (line,) = lines(check_gpus(dataclasses.replace(HEALTHY, **changes)))  # type: ignore[arg-type]
    assert line.startswith(expected)


def test_broken_and_absent_kernel_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ("nvmath-python", "flash-attn-4", "flash-attn")
    monkeypatch.setattr(doctor_gpu, "installed_version", lambda name: None if name in absent else "1")
    facts = dataclasses.replace(HEALTHY, trials=[BROKEN])
    assert lines(check_kernels(facts)) == [
        "warning kernels: fa3-fwd 0.0.3 is unusable, cuDNN or PyTorch attention is used: OSError: libcudart.so.12 -> "
        "reinstall fa3-fwd for torch 2.13.0+cu130, or uninstall it",
        "ok kernels: not installed (affects speed only): nvmath-python, flash-attn-4, flash-attn",
    ]
    required = dataclasses.replace(HEALTHY, trials=[], required_error="kernels: triton is not usable")
    assert lines(check_kernels(required))[0].startswith("error kernels: kernels: triton is not usable -> repair")


def test_the_driver_version_is_that_of_the_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert read_driver(file) == NvidiaDriver()
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert read_driver(file).version == "580.65.06"


def test_facts_are_read_in_a_subprocess() -> None:
    facts = read_gpu_facts()
    assert facts.torch == torch.__version__
    assert not facts.gpus
    with pytest.raises(
        FailedPrecondition, match=r"torch and the kernel packages failed: .*kernels: 'unknown' is not one of auto"
    ):
        read_gpu_facts(["--kernels", "unknown"])


def test_a_subprocess_that_aborts_or_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; os.abort()"
    monkeypatch.setattr(doctor_gpu, "tethered", lambda _: [sys.executable, "-c", code])
    with pytest.raises(FailedPrecondition, match="failed: exit code -6"):
        read_gpu_facts()
    monkeypatch.setattr(doctor_gpu, "SECONDS", 0.3)
    monkeypatch.setattr(doctor_gpu, "tethered", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(FailedPrecondition, match=r"did not load within 0.3 s"):
        read_gpu_facts()


def test_packages_are_tried_once_per_compute_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU of this host stands for two Hopper GPUs and one Ampere GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "flash-attn", "2.8.3", "flash_attn", FLASH_ATTN_2)
    install(tmp_path, "fa3-fwd", "0.0.3", "fa3_fwd_interface", "raise OSError('libcudart.so.12')")
    capabilities = [HOPPER, HOPPER, (8, 0)]
    gpus = [Gpu("GPU", ".".join(map(str, each)), GIB, GIB) for each in capabilities]
    monkeypatch.setattr(doctor_gpu_facts, "_gpus", lambda: (gpus, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    tried: list[Capability] = []

    def on_cpu(_: int, capability: Capability, choice: KernelChoice) -> list[TrialOutcome]:
        tried.append(capability)
        return outcomes_on(torch.device("cpu"), capability, choice)

    monkeypatch.setattr(doctor_gpu_facts, "_tried", on_cpu)
    attention = tuple(each for each in PACKAGES if each.name in ("flash-attn", "fa3-fwd"))
    monkeypatch.setattr("models.kernels.trials.PACKAGES", attention)
    found = json.loads(json.dumps(doctor_gpu_facts.facts(KernelChoice())))
    assert tried == [HOPPER, (8, 0)]
    assert [(each["name"], each["error"]) for each in found["trials"]] == [
        ("fa3-fwd", "OSError: libcudart.so.12"),
        ("flash-attn", ""),
    ]
    assert found["attention"] == {"9.0": "cudnn, else sdpa", "8.0": "flash_attn_2, else sdpa"}
    required = doctor_gpu_facts.facts(KernelChoice(("fa3-fwd",)))
    assert "kernels: fa3-fwd is not usable: fa3-fwd 0.0.3 is broken" in required["required_error"]


@pytest.mark.parametrize(
    ("error", "choice", "expected"),
    [
        (
            "",
            KernelChoice(),
            f"flash_attn_3 for at least {TABLE[HOPPER][0].min_work} heads x tokens, else cudnn, else sdpa",
        ),
        ("broken", KernelChoice(), "cudnn, else sdpa"),
        ("", KernelChoice(attention="sdpa"), "sdpa (set by attention_backend), else sdpa"),
    ],
)
def test_attention_rows_report_the_backends_in_use(error: str, choice: KernelChoice, expected: str) -> None:
    (package,) = [each for each in PACKAGES if each.name == "fa3-fwd"]
    assert doctor_gpu_facts.attention_rows(HOPPER, choice, [TrialOutcome(package, "0.0.3", error)]) == expected
    assert doctor_gpu_facts.attention_rows((12, 0), KernelChoice(), []) == "sdpa"


def test_worker_settings_select_the_tried_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    flag_lists: list[list[str]] = []

    def read(flags: object) -> GpuFacts:
        flag_lists.append(list(flags))  # type: ignore[call-overload]
        return HEALTHY

    monkeypatch.setenv("FLEET_KERNELS", "triton,fa3-fwd")
    monkeypatch.setenv("FLEET_REDIS", "unix:///nowhere")
    monkeypatch.setenv("FLEET_LISTEN", "127.0.0.1:0")
    for service in ("denoising", "latent_preparation"):
        args = doctor._arguments(["--service", service])
        checks = [each for each in doctor.checks_of(args, read) if each.name in ("gpu", "kernels", "attention")]
        assert len(lines(run_checks(checks))) >= 4
    flags = ["--kernels", "triton", "--kernels", "fa3-fwd", "--attention-backend", "auto"]
    assert flag_lists == [flags, []], "facts are read once per service; services without kernel settings pass no flags"
