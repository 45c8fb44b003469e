"""`fleet size`: replicas from measured seconds, remarks on inefficient splits, and input errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.cli import size
from services.cli.__main__ import main
from services.cli.size import Load, ServiceSize, remarks, sizes_of
from services.cli.stage_seconds import Shape, group_speeds, measurements, transport
from tiny_wan import build_tiny_wan

ROOT = Path(__file__).resolve().parents[2]
FLUX = "--model FLUX.1-dev --requests-per-second 5"
EMOJI_VIDEO = (
    "--model emoji-video --requests-per-second 5 --stage-seconds text_encoding=0.004 "
    "--stage-seconds latent_preparation=0.001 --stage-seconds denoising=0.4 --stage-seconds decoding=0.02"
)


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["size", *arguments.split()]) == 0
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str]) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for line in lines if len(cells := line.split()) == 4}


def test_replicas_follow_from_rate_seconds_and_utilization() -> None:
    load = Load(2.0, 0.5, {"text_encoding": 0.1, "denoising": 3.0, "decoding": 0.25})
    assert sizes_of(load) == [
        ServiceSize("text_encoding", 0.1, 1, 0.2),
        ServiceSize("denoising", 3.0, 12, 0.5),
        ServiceSize("decoding", 0.25, 1, 0.5),
    ]


def test_a_published_model_is_sized_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(run(FLUX, capsys)) == {
        "SERVICE": ["SECONDS", "REPLICAS", "BUSY"],
        "text_encoding": ["0.061", "1", "30%"],
        "latent_preparation": ["0.032", "1", "16%"],
        "denoising": ["3.429", "25", "69%"],
        "decoding": ["0.161", "2", "40%"],
    }


def test_size_and_steps_scale_denoising_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    scaled = rows(run(f"{FLUX} --size 512x1024 --steps 14", capsys))
    assert scaled["text_encoding"][0] == "0.061"
    assert scaled["denoising"][0] == "0.857"
    assert scaled["decoding"][0] == "0.081"


def test_stage_seconds_override_the_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(run(f"{FLUX} --utilization 1 --stage-seconds denoising=2", capsys))["denoising"] == [
        "2.000",
        "10",
        "100%",
    ]


def test_the_default_model_needs_no_stage_seconds_and_no_fleet(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("--model emoji --requests-per-second 5", capsys)
    assert [cells[0] for cells in map(str.split, lines[1:5])] == [
        "text_encoding",
        "latent_preparation",
        "denoising",
        "decoding",
    ]
    assert rows(lines)["denoising"] == ["0.815", "6", "68%"]
    assert lines[5].startswith("Stage seconds: emoji on 2 cores of an AMD EPYC, 128x128, 20 steps")
    halved = rows(run("--model emoji --requests-per-second 5 --size 64x128 --steps 10", capsys))
    assert (halved["text_encoding"][0], halved["denoising"][0], halved["decoding"][0]) == ("0.017", "0.204", "0.050")


def test_remarks_name_inefficient_services(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(run(EMOJI_VIDEO, capsys))
    assert "Separate services need 5 devices; instances of the whole pipeline need 4." in text
    assert "text_encoding computes for 4.0 ms, less than one hop of 4 MB (6.9 ms)" in text
    assert "decoding uses 10% of one device: it can share another service's device" in text
    assert "Transport takes 13 ms per request, 3% of its compute time" in text


def test_less_than_half_a_millisecond_is_not_printed_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(run(f"{FLUX} --stage-seconds text_encoding=0.0004", capsys))["text_encoding"][0] == "<0.001"


def test_a_well_utilized_fleet_gets_no_remark() -> None:
    assert list(remarks(Load(10.0, 0.7, {"denoising": 7.0, "decoding": 0.7}), transport())) == []


def test_a_directory_is_recognized_by_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_tiny_wan(tmp_path / "wan") or tmp_path / "wan"
    arguments = f"--model {model} --requests-per-second 1 --size 480x832x81 --steps 4"
    assert main(["size", *arguments.split()]) == 2
    assert "no measurement of text_encoding, latent_preparation, denoising, decoding" in capsys.readouterr().err
    monkeypatch.setattr(size, "_transformer", lambda _: {"num_layers": 30, "num_attention_heads": 12})
    guided = rows(run(arguments, capsys))["denoising"][0]
    assert guided == "3.521"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: --model, --requests-per-second"),
        ("--model nowhere --requests-per-second 1", "'nowhere' is neither a directory nor"),
        ("--model FLUX.1-dev --requests-per-second 0", "--requests-per-second: 0 is not a number above 0"),
        ("--model FLUX.1-dev --requests-per-second nan", "--requests-per-second: nan is not a number above 0"),
        ("--model FLUX.1-dev --requests-per-second many", "'many' is not a number"),
        (f"{FLUX} --utilization 1.1", "--utilization: 1.1 is not a number above 0 and at most 1"),
        (f"{FLUX} --size 7", "--size: '7' is not HxW or HxWxF; 1024x1024 works"),
        (f"{FLUX} --size 64x64x5", "--size: 64x64x5 is not a size of FLUX.1-dev; 1024x1024 works"),
        (f"{FLUX} --steps 0", "--steps: 0 is not at least 1"),
        (f"{FLUX} --stage-seconds denoising", "'denoising' is not SERVICE=SECONDS"),
        (f"{FLUX} --stage-seconds denoising=-1", "'denoising=-1' is not SERVICE=SECONDS"),
        (f"{FLUX} --stage-seconds painting=1", "'painting' is not a service of FLUX.1-dev; services are text_encoding"),
        (f"{FLUX} --stage-seconds decoding=1 --stage-seconds decoding=2", "decoding is given twice"),
        ("--model emoji-video --requests-per-second 1", "no measurement of text_encoding, latent_preparation"),
        ("--model emoji --requests-per-second 1 --size 7x7", "height: 7 is not at least 16"),
        (f"{FLUX} --endpoint nonsense", "--endpoint: 'nonsense' is not HOST:PORT"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["size", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_other_shapes_scale_by_pixels_steps_and_branches() -> None:
    wan = measurements()["Wan2.1-T2V-1.3B"]
    pixels = wan.shape.pixels
    assert wan.seconds_of("denoising", Shape(pixels // 3, 8, 1)) == pytest.approx(3.521 / 3)
    assert wan.seconds_of("decoding", Shape(pixels // 3, 8, 1)) == pytest.approx(5.245 / 3)
    assert wan.seconds_of("text_encoding", Shape(pixels // 3, 8, 1)) == 0.135


def test_committed_stage_seconds_equal_those_of_the_bench_readme() -> None:
    text = (ROOT / "tests/bench/README.md").read_text(encoding="utf-8").partition("## Stage seconds")[2]
    for measurement in measurements().values():
        row = re.search(rf"^\| {re.escape(measurement.model)} \|.*$", text, re.MULTILINE)
        assert row is not None, measurement.model
        cells = [cell.strip() for cell in row.group().split("|")]
        assert "x".join(map(str, measurement.size)) in cells
        assert set(cells) >= {f"{seconds:.3f}" for seconds in measurement.seconds.values()}


def test_a_worker_group_needs_fewer_replicas_and_counts_its_devices(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(f"{FLUX} --degrees ring=2", capsys)
    assert lines[0].split() == ["SERVICE", "SECONDS", "REPLICAS", "BUSY", "DEVICES"]
    (denoising,) = (line.split() for line in lines if line.startswith("denoising "))
    assert denoising == ["denoising", "1.795", "13", "69%", "26"]
    assert lines[5].endswith("; a group with ring=2 is 1.91 times as fast as one NVIDIA H200 at 1024x1024.")
    assert "1.93 times" in run(f"{FLUX} --size 2048x2048 --degrees ring=2", capsys)[5]


def test_given_seconds_of_a_group_are_not_divided_by_its_speedup(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(f"{FLUX} --degrees cfg=2,tp=4 --stage-seconds denoising=0.7", capsys)
    (denoising,) = (line.split() for line in lines if line.startswith("denoising "))
    assert denoising == ["denoising", "0.700", "5", "70%", "40"]


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ("ring=4", "--degrees: ring=4 is not measured for FLUX.1-dev; ring=2, ulysses=2, tp=2 work, or give "),
        ("rings=2", "--degrees: 'rings=2' is not AXIS=N"),
        ("ring=0", "--degrees: 'ring=0' is not AXIS=N"),
        ("ring=2,ring=2", "--degrees: 'ring=2,ring=2' is not AXIS=N"),
    ],
)
def test_invalid_degrees_exit_2(degrees: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", *FLUX.split(), "--degrees", degrees]) == 2
    assert message in capsys.readouterr().err


def test_committed_speedups_equal_those_of_the_bench_readme() -> None:
    text = (ROOT / "tests/bench/README.md").read_text(encoding="utf-8").partition("### Steps on two GPUs")[2]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    heads, *rows = table[:5]
    published = set()
    for name, *cells in rows:
        model, size = re.fullmatch(r"(\S+) (\d+x\d+)\S*.*", name).groups()  # type: ignore[union-attr]
        for head, cell in zip(heads[1:], cells, strict=True):
            if speedup := re.search(r"\(\**([\d.]+)\**\)", cell):
                published.add((model, size, head.replace(" ", "="), float(speedup[1])))
    committed = {(each.model, "x".join(map(str, each.size)), each.degrees, each.speedup) for each in group_speeds()}
    assert committed == {row for row in published if row[0] in measurements()}
