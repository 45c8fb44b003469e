"""Images and videos on the command line. Invalid inputs are reported in one line, before a store starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from async_tests import HANG_SECONDS
from common.state.embedded import EmbeddedStore
from services.cli.__main__ import main
from tiny_wan import build_tiny_wan_i2v, build_tiny_wan_ti2v


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models, valid images and invalid images."""
    root = tmp_path_factory.mktemp("images")
    build_tiny_wan_i2v(root / "i2v")
    build_tiny_wan_i2v(root / "flf2v", last_image=True)
    build_tiny_wan_ti2v(root / "ti2v")
    noise = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    good = Image.fromarray(noise)
    good.save(root / "good.png")
    good.save(root / "old.gif")
    good.save(root / "animated.webp", save_all=True, append_images=[Image.fromarray(255 - noise)])
    data = (root / "good.png").read_bytes()
    (root / "truncated.png").write_bytes(data[:2000])
    offset = data.index(b"IDAT") + 20
    (root / "corrupt.png").write_bytes(data[:offset] + bytes(200) + data[offset + 200 :])
    (root / "text.png").write_text("no image")
    return root


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: EmbeddedStore) -> None:
        raise AssertionError("a store was started")

    monkeypatch.setattr(EmbeddedStore, "__enter__", start)
    monkeypatch.delenv("FLEET_PLUGINS", raising=False)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model i2v --output a.mp4", "image: no image was sent; i2v (WanImageToVideoPipeline) requires an image"),
        ("--model i2v --image nowhere.png --output a.mp4", "cannot read the image nowhere.png"),
        ("--model i2v --image text.png --output a.mp4", "image is not a PNG, JPEG or WebP image"),
        ("--model i2v --image old.gif --output a.mp4", "image is not a PNG, JPEG or WebP image but GIF"),
        ("--model i2v --image animated.webp --output a.mp4", "image is an animated WebP"),
        ("--model i2v --image truncated.png --output a.mp4", "image is truncated"),
        ("--model i2v --image corrupt.png --output a.mp4", "image cannot be decoded"),
        (
            "--model i2v --image good.png --image good.png --output a.mp4",
            "images: image, image_1 is not a set of images",
        ),
        ("--model i2v --image good.png --param image=good.png --output a.mp4", "image: the image is given twice"),
        (
            "--model i2v --image good.png --param last_image=good.png --output a.mp4",
            "image, last_image is not a set of images",
        ),
        ("--model flf2v --image good.png --output a.mp4", "last_image: no image was sent"),
        (
            "--model ti2v --param last_image=good.png --output a.mp4",
            "last_image is not a set of images of ti2v, which takes: text (no images), im",
        ),
        (
            "--model ti2v --image good.png --image good.png --output a.mp4",
            "image, image_1 is not a set of images of ti2v, which takes: text (no i",
        ),
        (
            "--model emoji-video --image good.png --output a.mp4",
            "images: 1 is not 0; emoji-video (WanPipeline) takes no images",
        ),
        (
            "--model emoji-video --output a.png",
            "generates videos, and .png needs an image model; give .mp4",
        ),
        ("--model emoji --output a.mp4", "generates images, and .mp4 needs a video model; give .png"),
        ("--model emoji-video --num-frames 0 --output a.mp4", "num_frames: 0 is not a whole number from 1"),
        ("--model emoji-video --height 72 --output a.mp4", "height: 72 is not a multiple of 16"),
    ],
)
def test_invalid_inputs_are_reported_in_one_line(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(files)
    assert main(["generate", "x", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not list(files.glob("a.*"))


def test_readme_command_writes_a_video(tmp_path: Path) -> None:
    """The README's command, with fewer steps and frames, writes an MP4."""
    output = tmp_path / "heart.mp4"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    flags = (
        "generate",
        "a red heart beating",
        "--model",
        "emoji-video",
        "--num-inference-steps",
        "3",
        "--num-frames",
        "12",
    )
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", *flags, "--output", str(output)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}\n"
    assert done.stderr.count("num_frames: 12 is not one more than a multiple of 4; 13 is used instead") == 1
    with av.open(str(output), "r") as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (64, 64, 8.0)
        assert len(list(container.decode(stream))) == 13
