"""`fleet doctor`: checks of checkpoint files, and of weight sizes against memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bare_checkpoint import build_bare_flux, safetensors_bytes
from doctor_lines import lines
from services.cli import doctor, doctor_checkpoint
from services.cli.__main__ import main
from services.cli.doctor_checkpoint import check_memory, check_model, directory_of, host_memory
from services.cli.doctor_gpu import Gpu, GpuFacts, NvidiaDriver

MIB = 1 << 20
CPU = GpuFacts("2.13.0+cpu", "", NvidiaDriver())


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A checkpoint whose transformer has two shards with 24 and 40 bytes of tensors."""
    path = build_bare_flux(tmp_path / "flux")
    folder = path / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    save_file({"a": torch.zeros(6)}, shard(path, 1))
    save_file({"b": torch.zeros(10)}, shard(path, 2))
    write_index(path, 64)
    return path


def shard(path: Path, number: int) -> Path:
    return path / "transformer" / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"


def write_index(path: Path, size: int) -> None:
    weight_map = {"a": shard(path, 1).name, "b": shard(path, 2).name}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def gpu_facts(*sizes: int) -> GpuFacts:
    """GpuFacts of GPUs with these memory sizes in bytes; half of each is free."""
    gpus = [Gpu("GPU", "9.0", size, size // 2) for size in sizes]
    return GpuFacts("2.13.0+cu130", "13.0", NvidiaDriver("580", "13.0"), gpus)


def test_a_complete_checkpoint_is_accepted_per_module(flux: Path) -> None:
    found = lines(check_model(str(flux)))
    assert found[:4] == [
        "ok checkpoint: text_encoder: 1 file, 0.0 MiB in total, complete",
        "ok checkpoint: text_encoder_2: 1 file, 0.0 MiB in total, complete",
        "ok checkpoint: transformer: 2 files, 0.0 MiB in total, complete",
        "ok checkpoint: vae: 1 file, 0.0 MiB in total, complete",
    ]
    assert found[4].startswith("ok model: flux (FluxPipeline), checkpoint ")
    assert found[4].endswith("services text_encoding, latent_preparation, denoising, decoding")
    assert len(found) == 5


def test_every_faulty_file_of_every_module_is_named(flux: Path) -> None:
    second = shard(flux, 2)
    second.write_bytes(second.read_bytes()[:-1])
    shard(flux, 1).unlink()
    vae = flux / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes() + b"x")
    found = [line for line in lines(check_model(str(flux))) if line.startswith("error")]
    assert len(found) == 3
    assert "index.json names diffusion_pytorch_model-00001-of-00002.safetensors, which is missing -> down" in found[0]
    assert f"{second} is truncated: its header describes " in found[1]
    assert f"{vae} is too long: its header describes " in found[2]
    assert not [line for line in lines(check_model(str(flux))) if " model:" in line], (
        "a faulty checkpoint must not be opened"
    )


def test_an_index_with_a_wrong_total_size_is_a_warning(flux: Path) -> None:
    write_index(flux, 65)
    (line,) = [line for line in lines(check_model(str(flux))) if line.startswith("warning")]
    assert "index.json states total_size 65, and its files hold 64 bytes of tensors -> download the index and" in line


def test_missing_directories_and_invalid_indices_are_errors(flux: Path, tmp_path: Path) -> None:
    (flux / "vae").rename(tmp_path / "elsewhere")
    (line,) = [line for line in lines(check_model(str(flux))) if line.startswith("error")]
    assert f"{flux}/vae, listed in model_index.json, is missing" in line
    (line,) = lines(check_model(str(tmp_path / "nowhere")))
    assert "is neither a directory nor a shipped model" in line
    (flux / "model_index.json").write_text("{")
    (line,) = lines(check_model(str(flux)))
    assert "model_index.json is not valid JSON" in line


def test_a_broken_tokenizer_is_an_error(flux: Path) -> None:
    (flux / "tokenizer" / "tokenizer.json").write_text("{}")
    found = lines(check_model(str(flux)))
    assert found[-1].startswith("error model: ")
    assert "tokenizer.json" in found[-1]
    assert len(found) == 5


def test_directory_of_accepts_model_references(flux: Path) -> None:
    assert directory_of(str(flux)) == flux
    assert directory_of(f"name={flux}") == flux
    assert (directory_of("emoji") / "model_index.json").is_file()


def test_the_command_reports_a_truncated_shard(
    flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "has_worker_extra", lambda: False)
    path = shard(flux, 1)
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["doctor", "--model", str(flux)]) == 2
    assert f"error    checkpoint        {path} is truncated" in capsys.readouterr().out


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A checkpoint with 64 MiB of float32 in its transformer and 4 MiB in each other module with weights."""
    path = build_bare_flux(tmp_path / "large")
    for module, mib in (("transformer", 64), ("vae", 4), ("text_encoder", 4), ("text_encoder_2", 4)):
        (file,) = (path / module).glob("*.safetensors")
        file.write_bytes(safetensors_bytes({"weight": [0.0] * (mib * MIB // 4)}))
    return path


def test_weights_are_compared_with_the_largest_gpu_in_bfloat16(large: Path) -> None:
    assert lines(check_memory(str(large), gpu_facts(64 * MIB, 100 * MIB), {})) == [
        "ok memory: text_encoding of large needs 4.0 MiB for weights; cuda:1 has 100.0 MiB",
        "ok memory: denoising of large needs 32.0 MiB for weights; cuda:1 has 100.0 MiB",
        "ok memory: decoding of large needs 2.0 MiB for weights; cuda:1 has 100.0 MiB",
    ]


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        (
            31 * MIB,
            {},
            "error memory: denoising of large needs 32.0 MiB for weights; cuda:0 has 31.0 MiB -> use",
        ),
        (
            39 * MIB,
            {},
            "warning memory: denoising of large needs 32.0 MiB for weights; cuda:0 has 39.0 MiB, whi",
        ),
        (
            63 * MIB,
            {},
            "warning memory: denoising of large needs 32.0 MiB for weights; cuda:0 has 63.0 MiB, of ",
        ),
        (63 * MIB, {"tp": 2}, "ok memory: denoising of large needs 16.0 MiB for weights; cuda:0 has 63.0 MiB"),
        (63 * MIB, {"dtype": "float32"}, "error memory: denoising of large needs 64.0 MiB for weights; cuda:0"),
    ],
)
def test_weights_are_compared_with_total_and_free_memory(
    size: int, settings: dict[str, object], expected: str, large: Path
) -> None:
    assert lines(check_memory(str(large), gpu_facts(size), settings))[1].startswith(expected)


def test_swapped_experts_need_less_memory(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_checkpoint._loaded_bytes
    monkeypatch.setattr(doctor_checkpoint, "_loaded_bytes", lambda model, _, size: real(model, "vae", size))
    monkeypatch.setattr("common.pipeline.ServiceSpec.modules", ("transformer", "transformer_2"))
    both, one = (lines(check_memory(str(large), CPU, {"swap_experts": swap}))[2] for swap in (False, True))
    assert "denoising of large needs 8.0 MiB" in both
    assert "denoising of large needs 4.0 MiB" in one


def test_float32_weights_are_compared_with_host_memory_without_a_gpu(large: Path) -> None:
    found = lines(check_memory(str(large), CPU, {}))
    assert found[1].startswith("ok memory: denoising of large needs 64.0 MiB for weights; this host has ")
    assert not lines(check_memory(str(large / "nowhere"), CPU, {})), "check_model() reports a missing directory"


def test_host_memory_respects_the_container_limit(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    without_limit = host_memory(meminfo, limit)
    assert without_limit[0] == without_limit[1] > 64 * MIB
    meminfo.write_text("MemTotal:       99 kB\nMemFree:        1 kB\nMemAvailable:    2048 kB\n")
    limit.write_text("max\n")
    assert host_memory(meminfo, limit) == (without_limit[0], 2 * MIB)
    limit.write_text(f"{MIB}\n")
    assert host_memory(meminfo, limit) == (MIB, MIB)
