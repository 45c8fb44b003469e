"""Command lines of `fleet`: invalid input, parameters, exit codes and output files."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import CheckpointError, InternalError, InvalidInput, NotFound, Unavailable
from common.settings import FlagParser, SettingsError
from common.state.embedded import EmbeddedStore
from fleet.v1 import generation_pb2
from services.cli.__main__ import COMMANDS, main
from services.cli.options import endpoint_of, exit_code
from services.cli.output import OutputError, ResultFiles, check_output, numbered
from services.cli.parameters import add_parameters, given_images, given_parameters, parameters_message
from services.cli.serve import service_names
from services.cli.status_cells import shortened
from services.start_up import one_line


@pytest.fixture(autouse=True)
def _no_store_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start(_: EmbeddedStore) -> None:
        raise AssertionError("a store was started")

    monkeypatch.setattr(EmbeddedStore, "__enter__", start)
    for name in ("FLEET_ENDPOINT", "FLEET_PLUGINS", "FLEET_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no command given"),
        ("draw", "unknown command 'draw'; commands are generate, up,"),
        ("generate", "required: PROMPT, --output"),
        ("generate p --output X.png --hight 3", "unrecognized arguments: --hight 3"),
        ("generate p --output X.gif", "x.gif' does not end in .png or .mp4 or .safetensors; image.png works"),
        ("generate p --output X/y.png", "does not exist"),
        ("generate p --output X.png --height tall", "--height: 'tall' is not a whole number"),
        ("generate p --output X.png --height 7", "height: 7 is not at least 16"),
        ("generate p --output X.png --guidance-scale nan", "guidance_scale: nan is not a finite number"),
        ("generate p --output X.png --num-inference-steps 0", "num_inference_steps"),
        ("generate p --output X.png --num-inference-steps -3", "num_inference_steps"),
        ("generate p --output X.png --num-outputs 0", "num_outputs_per_prompt"),
        ("generate p --output X.png --seed -1", "seed"),
        ("generate p --output X.png --num-frames 5", "num_frames"),
        ("generate p --output X.png --dtype int8", "choose from 'float32', 'bfloat16'"),
        ("generate p --output X.png --model nowhere", "'nowhere' is neither a directory nor"),
        ("generate p --output X.png --param steps", "--param: 'steps' is not KEY=VALUE"),
        ("generate p --output X.png --param =1", "--param: '=1' is not KEY=VALUE"),
        ("generate p --output X.png --param stepz=3", "no parameter 'stepz'"),
        ("generate p --output X.png --param height=tall", "height: 'tall' is not a whole number"),
        (
            "generate p --output X.png --param seed=99999999999999999999",
            "seed: 99999999999999999999 is not a signed 64-bit integer",
        ),
        ("generate p --output X.png --seed 1 --param seed=2", "seed: the parameter is given twice"),
        ("generate p --output X.png --param sigmas={}", "--param sigmas: {} is not a text"),
        ("generate p --output X.png --image X.jpg", "cannot read the image"),
        ("generate p --output X.png --param last_image=X.jpg", "cannot read the image"),
        ("generate p --output X.mp4", "emoji (FluxPipeline) generates images, and .mp4 needs a video model"),
        ("generate p --output X.png --redis nonsense", "is not a Redis URL"),
        ("generate p --output X.png --endpoint nonsense", "--endpoint: 'nonsense' is not HOST:PORT"),
        ("generate p --output X.png --endpoint a:1 --dtype float32", "--dtype cannot be combined with --endpoint"),
        ("generate p --output X.png --endpoint a:1 --redis redis://a", "--redis cannot be combined with --endpoint"),
        ("generate p --output X.png --endpoint a:1 --model ./emoji", "'./emoji' is not the name of a served model"),
        ("generate p --output X.png --api-key k", "--api-key needs --endpoint"),
        ("generate p --output X.png --endpoint a:1 --tls-ca X.pem", "x.pem cannot be read: No such file"),
        ("status --tls-cert X.pem", "tls_cert is set without tls_key"),
        ("models --api-key ké", "--api-key: the key is not printable ASCII"),
        ("up --model nowhere", "'nowhere' is neither"),
        ("up --model emoji --model emoji", "2 models have the name 'emoji'"),
        ("up --replicas painting=2", "SERVICE one of text_encoding, latent_preparation, denoising, decoding"),
        ("up --replicas denoising=0", "N from 1 to 64"),
        ("up --max-replicas denoising=2", "--max-replicas is used only with --autoscale; add --autoscale"),
        ("up --target-seconds 5", "--target-seconds is used only with --autoscale"),
        (
            "up --autoscale --max-replicas painting=2",
            "--max-replicas: 'painting=2' is not SERVICE=N with N from 1 to 64 and SERVICE",
        ),
        ("up --autoscale --max-replicas denoising=65", "N from 1 to 64"),
        (
            "up --autoscale --replicas denoising=3 --max-replicas denoising=2",
            "--max-replicas: denoising=2 is not at least --replicas denoising=3; denoising=3 works",
        ),
        ("up --autoscale --idle-seconds -1", "--idle-seconds: -1 is not a number of at least 0; 60 works"),
        ("up --headroom 1", "--headroom is used only with --autoscale; add --autoscale"),
        ("up --autoscale --headroom -0.5", "--headroom: -0.5 is not a number of at least 0; 1 works"),
        ("up --autoscale --headroom nan", "--headroom: nan is not a number of at least 0; 1 works"),
        ("up --autoscale --idle-seconds soon", "--idle-seconds: 'soon' is not a number"),
        ("up --autoscale --target-seconds 0", "--target-seconds: 0 is not a number above 0; 10 works"),
        ("up --autoscale --target-seconds inf", "--target-seconds: inf is not a number above 0; 10 works"),
        ("up --port 65536", "--port: 65536 is not from 0 to 65535"),
        ("up --redis nonsense", "is not a Redis URL"),
        ("up --tp 3", "tp x ulysses: 3 x 1 is not a divisor of the model's 4 attention heads"),
        ("up --cfg 3", "cfg: 3 is not at most 2; FluxPipeline has 2 branches: positive, negative"),
        ("up --ring two", "--ring: 'two' is not a whole number"),
        ("generate p --output X.png --tp 2", "start one with `fleet up --tp N`"),
        ("serve text_encoding --tp 2", "--tp is not a setting of this service; services that read it: denoising"),
        ("serve", "no service given; services are"),
        ("serve painting", "unknown service 'painting'"),
        ("status --endpoint :1", "--endpoint: ':1' is not HOST:PORT"),
        ("watch", "required: ID"),
        ("cancel ID --endpoint a:b", "--endpoint: 'a:b' is not HOST:PORT"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.replace("X", str(tmp_path / "x")) for argument in arguments.split()]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_an_image_is_refused_for_a_model_without_image_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_file = tmp_path / "in.png"
    image_file.write_bytes(b"png")
    assert main(["generate", "p", "--output", str(tmp_path / "x.png"), "--image", str(image_file)]) == 2
    assert "takes no images" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--negative-prompt", "--param=prompt_2"])
def test_text_that_is_not_utf8_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{flag}=\udcff"] if "=" in flag else [flag, "\udcff"]
    assert main(["generate", "p", "--output", str(tmp_path / "x.png"), *arguments]) == 2
    assert "the text is not valid UTF-8" in capsys.readouterr().err


def test_a_prompt_above_64_kib_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "x" * (64 * 1024 + 1), "--output", str(tmp_path / "x.png")]) == 2
    assert "prompt" in capsys.readouterr().err


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["up", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1:" in capsys.readouterr().err


def test_fleet_up_refuses_tls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLEET_TLS_CERT", "x.pem")
    assert main(["up"]) == 2
    assert "FLEET_TLS_CERT is set, but `fleet up` serves only this host" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code: int | str | None
    try:
        code = main([command, "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0
    assert f"fleet {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_service_names_include_services_and_exclude_the_command_line() -> None:
    assert {"coordinator", "text_encoding", "latent_preparation", "denoising", "decoding"} <= set(service_names())
    assert "cli" not in service_names()


def test_the_endpoint_flag_precedes_the_variable_which_precedes_the_default() -> None:
    environ = {"FLEET_ENDPOINT": "b:2"}
    assert endpoint_of("a:1", environ) == "a:1"
    assert endpoint_of(None, environ) == "b:2"
    assert endpoint_of(None, {}) == "127.0.0.1:50051"
    assert endpoint_of("unix:/tmp/x.sock", {}) == "unix:/tmp/x.sock"
    assert endpoint_of("[::1]:50051", {}) == "[::1]:50051"
    with pytest.raises(SettingsError):
        endpoint_of("host:70000", {})


def test_errors_have_exit_codes_and_one_line() -> None:
    bad = (InvalidInput("m"), NotFound("m"), CheckpointError("m"), SettingsError("m"))
    assert [exit_code(error) for error in bad] == [2, 2, 2, 2]
    assert [exit_code(error) for error in (Unavailable("m"), InternalError("m"))] == [1, 1]
    assert one_line(InvalidInput("two\nlines", field="seed")) == "seed: two lines"
    assert one_line(InvalidInput("seed is odd", field="seed")) == "seed is odd"
    assert one_line(InvalidInput("no \x1b[2J\u202e", field="\x07")) == "\ufffd: no \ufffd[2J\ufffd"
    assert one_line(InvalidInput("--num-outputs is odd", field="num_outputs")) == "--num-outputs is odd"


def parse(*argv: str) -> generation_pb2.GenerationParameters:
    """GenerationParameters of a `fleet generate` command line."""
    parser = FlagParser()
    add_parameters(parser)
    args = parser.parse_args(["p", *argv])
    return parameters_message(given_parameters(args), given_images(args), ".png")


def test_absent_flags_leave_fields_unset() -> None:
    expected = generation_pb2.GenerationParameters(prompt="p", output_format=generation_pb2.OUTPUT_FORMAT_PNG)
    assert parse() == expected


def test_each_flag_sets_its_field(tmp_path: Path) -> None:
    image_file = tmp_path / "in.png"
    image_file.write_bytes(b"png")
    flags = "--negative-prompt=n --seed=1 --num-inference-steps=2 --guidance-scale=3 --true-cfg-scale=4 --height=5"
    message = parse(*flags.split(), "--width=6", "--num-frames=7", "--num-outputs=8", "--image", str(image_file))
    assert message == generation_pb2.GenerationParameters(
        prompt="p",
        negative_prompt="n",
        seed=1,
        num_inference_steps=2,
        guidance_scale=3.0,
        true_cfg_scale=4.0,
        height=5,
        width=6,
        num_frames=7,
        num_outputs_per_prompt=8,
        output_format=generation_pb2.OUTPUT_FORMAT_PNG,
        images=[generation_pb2.ImageInput(role="image", data=b"png")],
    )


def test_param_values_are_parsed_as_json_or_text() -> None:
    texts = {"a": "1", "b": "1.5", "c": "true", "d": "red apple", "e": '"7"', "f": "[1, 0.5]", "g": ""}
    message = parse(*(f"--param={name}={text}" for name, text in texts.items()))
    assert message.params["a"].int_value == 1
    assert message.params["b"].double_value == 1.5
    assert message.params["c"].bool_value is True
    assert message.params["d"].string_value == "red apple"
    assert message.params["e"].string_value == "7"
    assert list(message.params["f"].doubles_value.values) == [1.0, 0.5]
    assert message.params["g"].WhichOneof("kind") == "string_value"


def test_param_accepts_field_names_and_diffusers_names(tmp_path: Path) -> None:
    image_file = tmp_path / "last.png"
    image_file.write_bytes(b"png")
    message = parse(
        "--param=num_images_per_prompt=3",
        "--param=true_cfg_scale=2",
        "--param=prompt_2=a=b",
        f"--param=last_image={image_file}",
    )
    assert message.num_outputs_per_prompt == 3
    assert message.true_cfg_scale == 2.0
    assert message.params["prompt_2"].string_value == "a=b"
    assert [(image.role, image.data) for image in message.images] == [("last_image", b"png")]


def test_only_multiple_outputs_are_numbered() -> None:
    assert numbered(Path("a/b.png"), 0, 1) == Path("a/b.png")
    assert [str(numbered(Path("a/b.png"), index, 2)) for index in (0, 1)] == ["a/b-0.png", "a/b-1.png"]


def test_a_directory_is_refused_as_output(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(InvalidInput, match="is a directory"):
        check_output(tmp_path / "x.png")
    assert check_output(tmp_path / "X.PNG") == tmp_path / "X.PNG"


def test_a_file_is_replaced_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")
    with ResultFiles(target) as files:
        files.begin(0, 1, 4)
        files.write(b"ab")
        assert target.read_bytes() == b"old"
        files.write(b"cd")
        assert target.read_bytes() == b"abcd"
        assert files.paths == [target]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("byte_size", "message"), [(4, "2 bytes before"), (1, "more bytes")])
def test_a_file_of_the_wrong_size_is_deleted(byte_size: int, message: str, tmp_path: Path) -> None:
    def receive() -> None:
        with ResultFiles(tmp_path / "x.png") as files:
            files.begin(0, 2, byte_size)
            files.write(b"ab")
            files.begin(1, 2, byte_size)

    with pytest.raises(InternalError, match=message):
        receive()
    assert not list(tmp_path.iterdir())


@contextmanager
def file_size_limit(byte_size: int) -> Iterator[None]:
    """Limit the size of files that this process writes, to imitate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (byte_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("byte_size", [pytest.param(20, id="flush() fails"), pytest.param(100_000, id="write() fails")])
def test_a_full_disk_is_an_error_and_leaves_no_file(byte_size: int, tmp_path: Path) -> None:
    def receive() -> None:
        with ResultFiles(tmp_path / "x.png") as files:
            files.begin(0, 1, byte_size)
            with file_size_limit(10):
                files.write(bytes(byte_size))

    with pytest.raises(OutputError, match=r"cannot write .*x\.png: File too large"):
        receive()
    assert not list(tmp_path.iterdir())


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with (
        ResultFiles(tmp_path / "gone" / "x.png") as files,
        pytest.raises(OutputError, match=r"x\.png: No such file or directory"),
    ):
        files.begin(0, 1, 4)


def test_shortened_replaces_control_characters() -> None:
    assert shortened("a \x1b]0;title\x07 cat\r\n\x9b31m") == "a \ufffd]0;title\ufffd cat \ufffd31m"
    assert shortened("ü" * 60) == "ü" * 47 + "…"
