"""`fleet generate`: one request, to a running fleet or to a fleet started in this process."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common.artifacts import ParamValue
from common.errors import InvalidInput
from common.package_guard import WORKER_PACKAGES, check_versions
from common.settings import SettingsError
from common.state.embedded import EmbeddedStore, private_directory
from fleet.v1 import generation_pb2
from models.catalog import DEFAULT_MODEL, ServedModel, open_model
from models.registry import load_registry
from models.validation import InputValidationStage
from services.cli.access import Access, access_of
from services.cli.client import connect
from services.cli.drawing import draw
from services.cli.options import (
    ACCESS_FLAGS,
    DEGREES,
    SUCCESS,
    add_access,
    command_parser,
    endpoint_of,
    let_threads_sleep,
    run_async,
)
from services.cli.output import check_output
from services.cli.parameters import add_parameters, given_images, given_parameters, parameters_message
from services.cli.progress import terminal_reporter
from services.cli.store import check_store


def main(argv: Sequence[str]) -> int:
    """Run `fleet generate`. Validates all arguments before it starts a fleet or sends a request."""
    args = _arguments(argv)
    output = check_output(args.output)
    given, images = given_parameters(args), given_images(args)
    request = generation_pb2.SubmitRequest(
        model=args.model or "",
        parameters=parameters_message(given, images, output.suffix.lower()),
        idempotency_key=args.idempotency_key or "",
    )
    if args.endpoint:
        return run_async(_at_endpoint(endpoint_of(args.endpoint), access_of(args), request, output))
    model = open_model(args.model or DEFAULT_MODEL, load_registry(plugin_directories()))
    request.model = model.name
    _validate(model, given, output, dict(images))
    if args.redis:
        check_store(args.redis)
    with contextlib.ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # The store is discarded when this process ends, so its writes need no fsync.
        redis_url = args.redis or stack.enter_context(EmbeddedStore(appendfsync="no")).url
        return run_async(_in_process(model, args.dtype, redis_url, directory, request, output), abandon=stack.close)


def _validate(model: ServedModel, given: Mapping[str, ParamValue], output: Path, images: Mapping[str, bytes]) -> None:
    """Validate the request as the coordinator will."""
    validation = InputValidationStage(model)
    variant = validation.choose(given, images)
    name, formats = output.suffix.lower().removeprefix("."), variant.sampling_params.output_formats
    if name not in formats:
        makes, needs = ("images", "a video model") if name == "mp4" else ("videos", "an image model")
        raise InvalidInput(
            f"{model.name} ({model.checkpoint.pipeline_name}) generates {makes}, and .{name} needs {needs}; "
            f"give {' or '.join(f'.{each}' for each in formats)}",
            field="output",
        )
    validation.run({**given, "output_format": name}, images)
    if images:
        # Imported here because it imports torch. Services also refuse an unreadable image, but after loading weights.
        from models.images import open_image

        for role, data in images.items():
            open_image(role, data)


def plugin_directories() -> list[Path]:
    """The directories in FLEET_PLUGINS, which contain model families from outside this tree."""
    return [Path(each) for each in os.environ.get("FLEET_PLUGINS", "").split(",") if each.strip()]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("generate", "Generate an image or video. The path of the result is printed on stdout.")
    add_parameters(parser)
    parser.add_argument(
        "--model", metavar="DIR|NAME", help=f"Diffusers directory, or name of a model (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the computation; only without --endpoint"
    )
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", help="address of a running fleet (default: a fleet in this process)"
    )
    parser.add_argument("--redis", metavar="URL", help="request store; only without --endpoint (default: embedded)")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="file of the result; ends in .png, .mp4 or .safetensors",
    )
    parser.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="with --endpoint: the request continues if this command ends; repeat the command to fetch the result",
    )
    add_access(parser)
    for axis in DEGREES:
        parser.add_argument(f"--{axis}", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for axis in DEGREES:
        if vars(args)[axis] is not None:
            raise SettingsError(
                f"--{axis} needs a worker group of several processes: start one with `fleet up --{axis} N` or "
                f"`fleet serve denoising --{axis} N`, and connect to it with --endpoint",
                field=axis,
            )
    if not args.endpoint:
        for flag in ("idempotency_key", *ACCESS_FLAGS):
            if vars(args)[flag]:
                raise SettingsError(f"--{flag.replace('_', '-')} needs --endpoint", field=flag)
    if args.endpoint:
        for flag in ("dtype", "redis"):
            if vars(args)[flag]:
                raise SettingsError(
                    f"--{flag} cannot be combined with --endpoint: the running fleet has its own setting", field=flag
                )
        if args.model and (os.sep in args.model or "=" in args.model or not args.model.isascii()):
            raise SettingsError(
                f"--model: {args.model!r} is not the name of a served model, which --endpoint requires; `fleet models` "
                "lists the names",
                field="model",
            )
    return args


async def _at_endpoint(endpoint: str, access: Access, request: generation_pb2.SubmitRequest, output: Path) -> int:
    async with connect(endpoint, access) as client:
        with terminal_reporter() as report:
            paths = await draw(client, request, output, report)
    return _print_paths(paths)


async def _in_process(
    model: ServedModel,
    dtype: Literal["float32", "bfloat16"] | None,
    redis_url: str,
    directory: Path,
    request: generation_pb2.SubmitRequest,
    output: Path,
) -> int:
    let_threads_sleep()
    check_versions(*WORKER_PACKAGES)
    # Imported here because it imports torch, which bad flags, --help and --endpoint do not need.
    from services.cli.local import start_fleet

    with terminal_reporter() as report:
        started = time.perf_counter()
        fleet = await start_fleet([model], redis_url=redis_url, dtype=dtype, directory=directory)
        try:
            report.note(f"{model.name} is loaded ({time.perf_counter() - started:.1f} s)")
            async with connect(fleet.endpoint) as client:
                paths = await draw(client, request, output, report)
        finally:
            await fleet.stop()
            # The final garbage collection takes a second with torch and transformers; this exempts all objects from it.
            gc.freeze()
    return _print_paths(paths)


def _print_paths(paths: Sequence[Path]) -> int:
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    sys.stdout.flush()
    return SUCCESS
