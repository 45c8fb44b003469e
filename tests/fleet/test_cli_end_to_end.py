"""Commands of the command line with real fleets of the emoji model: outputs, exit codes and cleanup."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from async_tests import HANG_SECONDS, poll
from local_fleet import open_fleet
from toy_checkpoint import build_toy_checkpoint, copy_toy_family

_FLEET = (sys.executable, "-m", "services.cli")


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """Directory for temporary files, with a short path because paths of Unix sockets must be short."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def environ(temporary: Path) -> dict[str, str]:
    """Environment without the host's settings, and with one thread per process."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    return {**others, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}


def fleet(temporary: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `fleet ARGUMENTS` to its end; `settings` are environment variables."""
    environment = {**environ(temporary), **settings}
    return subprocess.run(
        [*_FLEET, *arguments], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


@dataclass
class Running:
    """A running `fleet` process."""

    process: subprocess.Popen[str]

    def line(self, pattern: str) -> re.Match[str]:
        """Read the output up to a matching line."""
        assert self.process.stdout is not None
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no line matches {pattern!r}: {''.join(seen)}")

    def descendants(self) -> list[psutil.Process]:
        """All processes that the process has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal and wait for the exit; returns the exit code and the remaining output."""
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=HANG_SECONDS)
        return self.process.returncode, output


@contextmanager
def started(temporary: Path, *arguments: str, **settings: str) -> Iterator[Running]:
    """Run `fleet ARGUMENTS` in the block, with stderr redirected to stdout; kill it at the end."""
    command, environment = [*_FLEET, *arguments], {**environ(temporary), **settings}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def wait_ended(processes: Sequence[psutil.Process]) -> None:
    """Wait until all processes have ended; zombies count as ended."""
    poll(lambda: not any(_is_alive(process) for process in processes), HANG_SECONDS, "all processes end")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_generate_without_an_endpoint_writes_an_image_and_cleans_up(temporary: Path, tmp_path: Path) -> None:
    output = tmp_path / "apple.png"
    done = fleet(temporary, "generate", "a red apple", "--num-inference-steps=3", "--seed=1", "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    with Image.open(output) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))
    assert "denoising 3/3" in done.stderr
    assert not list(temporary.glob("fleet-*"))
    assert list(tmp_path.iterdir()) == [output]


def test_generate_serves_a_family_of_a_plugin_directory(temporary: Path, tmp_path: Path) -> None:
    checkpoint = build_toy_checkpoint(tmp_path / "toy")
    output = tmp_path / "toy.png"
    plugins = str(copy_toy_family(tmp_path / "plugins"))
    command = ("generate", "hello", "--model", str(checkpoint), "--output", str(output))
    done = fleet(temporary, *command, FLEET_PLUGINS=plugins)
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    refused = fleet(temporary, *command)
    assert refused.returncode == 2
    assert "'ToyPipeline' is not supported; supported: Flux2KleinPipeline, Flux2Pipeline" in refused.stderr


def test_sigint_stops_generate_and_removes_its_files(temporary: Path, tmp_path: Path) -> None:
    flags = ("--num-inference-steps=1000", "--output", str(tmp_path / "x.png"))
    with started(temporary, "generate", "a red apple", *flags) as running:
        running.line(r"denoising \d+/1000")
        children = running.descendants()
        assert children, "no embedded store is running"
        code, output = running.end(signal.SIGINT)
    assert code == 130
    assert output.splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in output
    wait_ended(children)
    assert not list(temporary.glob("fleet-*"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def up(temporary: Path) -> Iterator[tuple[str, Running]]:
    """The endpoint and process of a fleet with two denoising workers."""
    with started(temporary, "up", "--port", "0", "--replicas", "denoising=2") as running:
        yield running.line(r"^ready: (\S+) serves emoji")[1], running


def test_commands_work_with_a_running_fleet(up: tuple[str, Running], temporary: Path, tmp_path: Path) -> None:
    endpoint = ("--endpoint", up[0])
    images = fleet(temporary, "generate", "a pear", "--num-outputs=2", "--output", str(tmp_path / "p.png"), *endpoint)
    assert images.stdout.splitlines() == [str(tmp_path / "p-0.png"), str(tmp_path / "p-1.png")], images.stderr

    status = fleet(temporary, "status", *endpoint).stdout
    assert re.search(r"^emoji +denoising +2 ", status, re.MULTILINE), status
    request_id = next(line.split()[0] for line in status.splitlines() if line.endswith("a pear"))
    watched = fleet(temporary, "watch", request_id, *endpoint)
    assert watched.returncode == 0, watched.stderr
    assert "denoising 20/20" in watched.stdout
    assert "file 1: image/png" in watched.stdout
    cancelled = fleet(temporary, "cancel", request_id, *endpoint)
    assert (cancelled.returncode, cancelled.stdout) == (1, f"{request_id} SUCCEEDED\n")
    assert "num_inference_steps: int = 20" in fleet(temporary, "models", *endpoint).stdout
    output = str(tmp_path / "x.safetensors")
    refused = fleet(temporary, "generate", "p", "--height=3", "--output", output, *endpoint)
    assert refused.returncode == 2
    assert refused.stderr.startswith("fleet generate: ")
    assert "height" in refused.stderr


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Set one PyTorch thread, as in the services, because the number of threads affects rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_flux_through_services_equals_flux_in_one_process(
    up: tuple[str, Running], temporary: Path, tmp_path: Path
) -> None:
    """Latents and pixels are bit-equal, with true CFG, two outputs and a size that is not square."""
    output = tmp_path / "apples.safetensors"
    size, guidance = ("--height=96", "--width=160"), ("--negative-prompt=a pear", "--true-cfg-scale=2.5")
    flags = ("--num-inference-steps=3", "--seed=1", "--num-outputs=2", *size, *guidance, "--output", str(output))
    done = fleet(temporary, "generate", "a red apple", *flags, "--endpoint", up[0])
    assert done.returncode == 0, done.stderr
    generated = load_file(output)

    local = open_fleet("emoji")
    expected = local.tensors(
        prompt="a red apple",
        num_inference_steps=3,
        seed=1,
        num_outputs_per_prompt=2,
        height=96,
        width=160,
        negative_prompt="a pear",
        true_cfg_scale=2.5,
    )
    local.close()
    assert generated.keys() == expected.keys() == {"latents", "pixels"}
    assert generated["pixels"].shape == (2, 3, 96, 160)
    for name, tensor in expected.items():
        assert torch.equal(generated[name], tensor), name


def test_size_measures_a_running_fleet_with_uncached_prompts(up: tuple[str, Running], temporary: Path) -> None:
    endpoint = ("--endpoint", up[0])
    load = ("--model=emoji", "--requests-per-second=5", "--steps=4", "--size=64x96")
    for _ in range(2):
        done = fleet(temporary, "size", *load, *endpoint)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines[1:5]] == [
            "text_encoding",
            "latent_preparation",
            "denoising",
            "decoding",
        ]
        seconds, replicas, busy = lines[3].split()[1:]
        assert 0.0 < float(seconds) < 60
        assert int(replicas) >= 1
        assert busy.endswith("%")
        assert lines[5] == f"Stage seconds: measured with one request at {up[0]}, after a warm-up request."
    listed = [line for line in fleet(temporary, "status", *endpoint).stdout.splitlines() if " SUCCEEDED " in line]
    assert len({line.split(maxsplit=5)[5] for line in listed[:4]}) == 4
    watched = fleet(temporary, "watch", listed[0].split()[0], *endpoint)
    assert "denoising 4/4" in watched.stdout


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (("--model", "emojis"), 2, "model: 'emojis' is not served; this fleet serves emoji"),
        (("--size", "7x7"), 2, "height: 7 is not at least 16"),
        (("--size", "64x64x5"), 2, "FluxPipeline has no parameter 'num_frames'"),
        (("--endpoint", "127.0.0.1:1"), 1, "no fleet answers at 127.0.0.1:1"),
        (("--stage-seconds", "painting=1"), 2, "'painting' is not a service of emoji; services are text_encoding, "),
    ],
)
def test_size_reports_errors_in_one_line(
    up: tuple[str, Running], temporary: Path, change: tuple[str, ...], code: int, message: str
) -> None:
    load = ("--model", "emoji", "--requests-per-second", "5", "--steps", "2", "--endpoint", up[0])
    done = fleet(temporary, "size", *load, *change)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done
    assert message in done.stderr


def test_cancel_stops_a_running_request(up: tuple[str, Running], temporary: Path, tmp_path: Path) -> None:
    endpoint = ("--endpoint", up[0])
    output = tmp_path / "x.png"
    flags = ("--num-inference-steps=1000", "--output", str(output))
    with started(temporary, "generate", "endless", *flags, *endpoint) as running:
        running.line(r"denoising \d+/1000")
        status = fleet(temporary, "status", *endpoint).stdout
        request_id = next(line.split()[0] for line in status.splitlines() if line.endswith("endless"))
        cancelled = fleet(temporary, "cancel", request_id, *endpoint)
        assert cancelled.returncode == 0, cancelled
        running.line(f"request {request_id} was cancelled")
        assert running.process.wait(HANG_SECONDS) == 1
    assert fleet(temporary, "watch", request_id, *endpoint).returncode == 1
    assert not list(tmp_path.iterdir())


def test_killed_service_is_restarted(up: tuple[str, Running]) -> None:
    _, running = up
    worker = next(each for each in running.descendants() if "decoding" in each.cmdline())
    worker.kill()
    running.line(r"decoding-0 \(pid \d+\) ended with signal SIGKILL; restarting it")
    assert int(running.line(r"decoding-0: started, pid (\d+)")[1]) != worker.pid


def test_sigint_ends_every_process_of_a_fleet(up: tuple[str, Running], temporary: Path) -> None:
    _, running = up
    children = running.descendants()
    assert len(children) >= 7
    code, output = running.end(signal.SIGINT)
    assert code == 0
    assert "Traceback" not in output
    wait_ended(children)
    assert not list(temporary.glob("fleet-*"))


@pytest.mark.usefixtures("one_thread")
def test_autoscaled_fleet_starts_without_workers_and_scales_to_zero(temporary: Path, tmp_path: Path) -> None:
    output = tmp_path / "apple.png"
    flags = ("--num-inference-steps=3", "--seed=1", "--output", str(output))
    scaling = ("--autoscale", "--idle-seconds=0.5", "--max-replicas=text_encoding=2", "--headroom=1")
    with started(temporary, "up", "--port=0", "--scaler-port=0", *scaling) as running:
        endpoint = running.line(r"^ready: (\S+) serves emoji")[1]
        assert len(running.descendants()) == 2, "processes other than the store and the coordinator are running"
        done = fleet(temporary, "generate", "a red apple", *flags, "--endpoint", endpoint)
        assert done.returncode == 0, done.stderr
        running.line("autoscaler: emoji/text_encoding: 1 -> 2 workers")  # one for the request, one for headroom
        running.line("autoscaler: emoji/decoding: 1 -> 0 workers")
        running.line(r"decoding-0 \(pid \d+\) ended with exit code 0; it is no longer needed")
        code, output_after = running.end(signal.SIGTERM)
    assert code == 0
    assert "restarting it" not in output_after
    local = open_fleet("emoji")
    (item,) = local.media(prompt="a red apple", num_inference_steps=3, seed=1).items
    local.close()
    assert output.read_bytes() == item.data.numpy().tobytes()


def test_no_process_outlives_a_killed_fleet(temporary: Path) -> None:
    with started(temporary, "up", "--port", "0") as running:
        running.line(r"decoding-0: started")
        children = running.descendants()
        assert len(children) == 6
        running.process.kill()
        running.process.wait()
        wait_ended(children)


def test_unavailable_store_is_reported_in_one_line(temporary: Path, tmp_path: Path) -> None:
    missing = f"unix://{tmp_path}/missing.sock"
    for command in (["up"], ["generate", "p", "--output", str(tmp_path / "x.png")]):
        done = fleet(temporary, *command, "--redis", missing)
        assert done.returncode == 1
        assert "the request store is unavailable" in done.stderr
        assert done.stderr.count("\n") == 1


def test_unreadable_checkpoint_ends_commands_with_exit_code_2(temporary: Path, tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "models" / "checkpoints" / "emoji"
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (weights,) = (broken / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    up = ["up", "--port", "0"]
    for command in (up, [*up, "--autoscale"], ["generate", "p", "--output", str(tmp_path / "x.png")]):
        done = fleet(temporary, *command, "--model", str(broken))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "vae" in done.stderr


def test_missing_weights_end_an_autoscaled_fleet_at_its_first_worker(temporary: Path, tmp_path: Path) -> None:
    """A restarted worker would fail, too. The fleet therefore ends, and the waiting request fails."""
    model = tmp_path / "emoji"
    shutil.copytree(Path(__file__).parents[2] / "models" / "checkpoints" / "emoji", model)
    up = ("up", "--port=0", "--autoscale", "--model", str(model))
    with started(temporary, *up, FLEET_GRACE_SECONDS="1") as running:
        endpoint = running.line(r"^ready: (\S+) serves emoji")[1]
        (weights,) = (model / "transformer").glob("*.safetensors")
        weights.unlink()
        done = fleet(temporary, "generate", "p", "--output", str(tmp_path / "x.png"), "--endpoint", endpoint)
        output, _ = running.process.communicate(timeout=HANG_SECONDS)
        assert running.process.returncode == 2
    assert done.returncode == 1
    assert "shut" in done.stderr, "the coordinator did not shut down"
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("fleet serve ")]
    assert 1 <= len(errors) <= 4, "a worker was restarted"
    assert all(f": {model / 'transformer'} contains no weights" in line for line in errors)
    (end,) = [line for line in lines if line.startswith("fleet up: ")]
    assert end.endswith("ended with exit code 2; a restart does not help")
    assert "restarting it" not in output
