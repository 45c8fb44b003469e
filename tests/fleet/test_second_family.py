"""Real processes serve a model family from a plugin directory, without changes to this tree."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from async_tests import HANG_SECONDS
from local_fleet import LocalFleet
from models.catalog import open_model
from models.registry import load_registry
from toy_checkpoint import build_toy_checkpoint, toy_family

NAME = "acme--toy-1.0"
FLEET = (sys.executable, "-m", "services.cli")


@dataclass(frozen=True)
class Served:
    """A fleet of processes that serves a model of the toy family, and its directories."""

    endpoint: str
    environ: dict[str, str]
    checkpoint: Path
    plugins: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `fleet` command at the fleet, without plugins in the command's process."""
        environ = {name: value for name, value in self.environ.items() if name != "FLEET_PLUGINS"}
        return subprocess.run(
            [*FLEET, *arguments, f"--endpoint={self.endpoint}"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # The directory layout of the Hugging Face cache: the model gets the repository's name.
    checkpoint = build_toy_checkpoint(tmp_path_factory.mktemp("toy") / "models--acme--toy-1.0/snapshots/0a1b2c")
    # A short path, as the path of a Unix socket has at most 107 bytes.
    temporary = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    with toy_family(tmp_path_factory.mktemp("toy") / "plugins") as plugins:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        environ = {**inherited, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "FLEET_PLUGINS": str(plugins)}
        with fleet_up(environ, str(checkpoint)) as endpoint:
            yield Served(endpoint, environ, checkpoint, plugins)
    shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def fleet_up(environ: dict[str, str], model: str) -> Iterator[str]:
    """Run `fleet up` in the block; yields its endpoint once the fleet is ready."""
    process = subprocess.Popen(
        [*FLEET, "up", "--port=0", f"--model={model}"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if match := re.search(rf"ready: (\S+) serves {NAME}", line):
                yield match[1]
                break
        else:
            pytest.fail("".join(lines))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG_SECONDS)


def test_plugin_family_tensors_equal_those_of_one_process(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "red.safetensors"
    arguments = (
        "generate",
        "x" * 65,
        f"--model={NAME}",
        "--seed=3",
        "--num-outputs=2",
        "--height=35",
        "--param=contrast=2",
    )
    done = served.run(*arguments, f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "height: 35 is not a multiple of 8; 32 is used instead" in done.stderr
    assert "only the first 64 of 65 bytes are read" in done.stderr

    fleet = LocalFleet(open_model(f"toy={served.checkpoint}", load_registry([served.plugins])))
    expected = fleet.tensors(prompt="x" * 65, seed=3, num_outputs_per_prompt=2, height=32, contrast=2.0)
    fleet.close()
    drawn = load_file(output)
    assert drawn.keys() == expected.keys()
    assert all(torch.equal(drawn[name], expected[name]) for name in expected)


def test_plugin_family_uses_its_own_defaults(served: Served, tmp_path: Path) -> None:
    output = tmp_path / "red.png"
    done = served.run("generate", "red", f"--output={output}")
    assert done.returncode == 0, done.stderr
    with Image.open(output) as image:
        assert (image.format, image.size) == ("PNG", (32, 32))


def test_plugin_family_parameters_are_listed(served: Served) -> None:
    done = served.run("models")
    assert done.returncode == 0, done.stderr
    assert f"{NAME} (ToyPipeline)" in done.stdout
    assert "contrast" in done.stdout


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--param=contrast=5", "contrast: 5 is not a finite number from 0.0 to 4.0"),
        ("--true-cfg-scale=2", "ToyPipeline has no parameter 'true_cfg_scale'"),
        ("--width=7", "width: 7 is not at least 8"),
    ],
)
def test_plugin_family_parameters_are_validated(served: Served, tmp_path: Path, flag: str, message: str) -> None:
    done = served.run("generate", "red", flag, f"--output={tmp_path / 'red.png'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
