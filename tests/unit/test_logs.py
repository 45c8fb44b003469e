"""Log lines: formats, escaping, hidden texts, and fields of the log context."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import InvalidInput
from common.log_context import enter_call, hide_texts, log_scope, outgoing_attempt
from common.log_format import RESERVED, LogFormat
from common.logs import get_logger, setup_logging
from common.trace_context import Span, TraceContext, entered

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = Span(TraceContext(TRACE_ID, "00f067aa0ba902b7"))
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

_log = get_logger("services.test")


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


def _set_up(out: io.StringIO, form: LogFormat = "text", level: str = "INFO") -> None:
    setup_logging("coordinator", level=level, form=form, stream=out)


def _json(out: io.StringIO) -> Any:
    (line,) = out.getvalue().splitlines()
    return json.loads(line)


def test_a_text_line_has_the_event_first_and_then_ids_and_pairs(out: io.StringIO) -> None:
    _set_up(out)
    with log_scope(request_id="r-1", model="emoji", stage="denoising", attempt=2), entered(SPAN):
        _log.info("request finished", state="SUCCEEDED", seconds=3.2, error=None, whole=True, note="two words")
    ids = f"request_id=r-1 trace_id={TRACE_ID} model=emoji stage=denoising attempt=2"
    pairs = 'state=SUCCEEDED seconds=3.2 whole=true note="two words"'
    assert re.fullmatch(rf"{TIME} INFO coordinator request finished {ids} {pairs}\n", out.getvalue())


def test_a_json_line_has_the_same_fields(out: io.StringIO) -> None:
    _set_up(out, "json")
    with log_scope(request_id="r-1", model="emoji", stage="denoising", attempt=2), entered(SPAN):
        _log.warning("request finished", state="SUCCEEDED", seconds=3.2, files=("a", "b"), never=float("nan"))
    line = _json(out)
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "level": "WARNING",
        "service": "coordinator",
        "event": "request finished",
        "request_id": "r-1",
        "trace_id": TRACE_ID,
        "model": "emoji",
        "stage": "denoising",
        "attempt": 2,
        "state": "SUCCEEDED",
        "seconds": 3.2,
        "files": ["a", "b"],
        "never": "nan",
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_one_field(out: io.StringIO, form: LogFormat) -> None:
    _set_up(out, form)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        _log.exception("call failed", method="/m")
        _log.error("call failed", exc_info=error)
    for line in out.getvalue().splitlines():
        text = json.loads(line)["exception"] if form == "json" else json.loads(line.partition("exception=")[2])
        assert text.startswith("Traceback (most recent call last):\n")
        assert text.endswith("ValueError: two\nlines")


def test_a_pair_cannot_replace_a_fixed_field(out: io.StringIO) -> None:
    _set_up(out, "json")
    _log.info("e", **dict.fromkeys(RESERVED, "mine"))
    line = _json(out)
    assert (line["event"], line["service"], line["level"]) == ("e", "coordinator", "INFO")
    assert all(line[f"{name}_"] == "mine" for name in RESERVED)


HOSTILE = '\x1b[2J\r\n2026-11-30T01:02:03.456Z INFO coordinator forged\u2028\x85\u202e\x00\x7f\ud800 a=b "q" \\'


@given(text=st.text(st.characters()), form=st.sampled_from(["text", "json"]))
@example(text=HOSTILE, form="text")
@example(text=HOSTILE, form="json")
def test_no_value_writes_newlines_or_control_characters(text: str, form: LogFormat) -> None:
    """The text is logged as a field, a table key, an ID, an exception and a message of a library."""
    out = io.StringIO()
    _set_up(out, form)
    error = ValueError(text)
    with log_scope(request_id=text, model=text):
        _log.error("e", value=text, table={text: [text]}, exc_info=error)
        logging.getLogger("library").error("%s", text)
    written = out.getvalue()
    assert written.endswith("\n")
    lines = written[:-1].split("\n")
    assert len(lines) == len(written.splitlines()) == 2
    assert all(line.isprintable() for line in lines)
    assert all(line.startswith('{"time": "2' if form == "json" else "2") for line in lines)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text=HOSTILE.replace("\ud800", ""))
def test_escaped_values_round_trip(text: str) -> None:
    for form in ("json", "text"):
        out = io.StringIO()
        _set_up(out, form)
        _log.info("e", value=f"={text}", end=1)
        line = out.getvalue()
        if form == "json":
            assert json.loads(line)["value"] == f"={text}"
        else:
            assert json.loads(line.partition(" value=")[2].rpartition(" end=1")[0]) == f"={text}"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_password_in_a_url_is_not_written(out: io.StringIO, form: LogFormat) -> None:
    _set_up(out, form, "DEBUG")
    url = "redis://user:canary@host:6379/0?ssl_password=canary2"
    _log.debug("e", url=url, table={"urls": [url]}, error=InvalidInput(f"redis: {url} is wrong"))
    logging.getLogger("redis").warning("cannot connect to %s", url)
    try:
        raise ValueError(url)
    except ValueError:
        _log.exception(f"no {url}")
    assert "canary" not in out.getvalue()
    assert "test_logs.py" in out.getvalue(), "other lines of the traceback must remain"


def test_hidden_texts_are_not_written(out: io.StringIO) -> None:
    """Texts are hidden in values, errors, messages of libraries and tracebacks."""
    prompt = 'a "canary"\non a branch'
    _set_up(out, level="DEBUG")
    with log_scope(private=[prompt, "cat"]):
        _log.info("e", value=f"<{prompt}>", quoted=repr(prompt), cat="cat")
        logging.getLogger("library").debug("%r is too long", prompt)
        try:
            raise ValueError(f"cannot encode {prompt}")
        except ValueError:
            _log.exception("failed")
    assert "canary" not in out.getvalue()
    assert "cat=cat" in out.getvalue(), "short texts are not hidden, since other words contain them"
    _log.info("e", value=prompt)
    assert "canary" in out.getvalue(), "texts are hidden only within the scope"


def test_log_lines_of_a_stage_call_have_the_context_of_its_metadata(out: io.StringIO) -> None:
    _set_up(out, "json")

    async def call() -> None:
        enter_call({"fleet-request-id": "r-1", "fleet-attempt": "3"}, model="emoji", stage="decoding")
        assert tuple(outgoing_attempt()) == (("fleet-attempt", "3"),)
        _log.info("e")
        hide_texts(["a long prompt"])
        _log.info("a long prompt")

    async def calls() -> None:
        await asyncio.create_task(call())
        _log.info("a long prompt")

    asyncio.run(calls())
    first, second, outside = map(json.loads, out.getvalue().splitlines())
    assert {name: first[name] for name in ("request_id", "model", "stage", "attempt")} == {
        "request_id": "r-1",
        "model": "emoji",
        "stage": "decoding",
        "attempt": 3,
    }
    assert (second["event"], second["request_id"]) == ("[hidden]", "r-1")
    assert outside["event"] == "a long prompt"
    assert "request_id" not in outside, "the context of a call ends with its task"


@pytest.mark.parametrize("attempt", ["", "x", "-1", "²", "9" * 5_000])
def test_an_invalid_attempt_is_omitted(out: io.StringIO, attempt: str) -> None:
    _set_up(out, "json")

    async def call() -> None:
        enter_call({"fleet-attempt": attempt}, model="m", stage="s")
        _log.info("e")

    asyncio.run(call())
    assert "attempt" not in _json(out)


def test_contexts_of_interleaved_requests_do_not_mix(out: io.StringIO) -> None:
    _set_up(out, "json")

    async def request(name: str, steps: int) -> None:
        with log_scope(request_id=name):
            for number in range(1, steps):
                with log_scope(stage=f"stage-of-{name}", attempt=number):
                    await asyncio.sleep(0)
                    _log.info("e", of=name, number=number)
                    await asyncio.sleep(0)
            _log.info("ended", of=name)

    async def both() -> None:
        await asyncio.gather(request("r-1", 5), request("r-2", 7))
        _log.info("after")

    asyncio.run(both())
    *lines, after = map(json.loads, out.getvalue().splitlines())
    assert len(lines) == 12
    assert [line["request_id"] for line in lines[:4]] == ["r-1", "r-2", "r-1", "r-2"], (
        "lines of the requests must alternate"
    )
    for line in lines:
        assert line["request_id"] == line["of"]
        assert line.get("attempt") == line.get("number")
        assert line.get("stage", f"stage-of-{line['of']}") == f"stage-of-{line['of']}"
        assert ("stage" in line) == (line["event"] == "e")
    assert "request_id" not in after


def test_an_announcement_is_written_at_every_level(out: io.StringIO) -> None:
    _set_up(out, level="ERROR")
    _log.info("not written")
    _log.announce("listens", address="127.0.0.1:1")
    assert re.fullmatch(rf"{TIME} INFO coordinator listens address=127\.0\.0\.1:1\n", out.getvalue())


def test_records_of_libraries_and_warnings_have_the_same_format(out: io.StringIO) -> None:
    _set_up(out, "json")
    logging.getLogger("grpc._cython.cygrpc").warning("a %s\nb", "word")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("slow", UserWarning, stacklevel=1)
        logging.captureWarnings(False)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["logger"], first["event"]) == ("grpc._cython.cygrpc", "a word\nb")
    assert second["logger"] == "py.warnings"
    assert "UserWarning: slow" in second["event"]


_LIBRARIES = """
import logging, sys, warnings
import torch
from common.logs import setup_logging
setup_logging("denoising", form="json")
logging.getLogger("torch.distributed.elastic.agent").warning("torch")
logging.getLogger("torch.distributed").warning("distributed")
from transformers.utils import logging as of_transformers
of_transformers.get_logger("transformers.models").warning("transformers")
from diffusers.utils import logging as of_diffusers
of_diffusers.get_logger("diffusers.models").warning("diffusers")
logging.getLogger("grpc.aio").warning("grpc")
logging.getLogger("redis.client").warning("redis")
warnings.warn("python")
"""


def test_records_of_libraries_with_own_handlers_are_written_once_in_the_fleet_format() -> None:
    """torch is imported before `setup_logging()`, transformers and diffusers after it."""
    done = subprocess.run([sys.executable, "-c", _LIBRARIES], capture_output=True, text=True, check=True)
    assert not done.stdout
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert events[:6] == ["torch", "distributed", "transformers", "diffusers", "grpc", "redis"]
    assert "UserWarning: python" in events[6]
    assert len(events) == 7
