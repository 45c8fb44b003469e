"""Stages start as soon as their inputs exist, and end together. Values are dropped after use. No test sleeps."""

# ruff: noqa: ARG001, ARG002  (runners and stages ignore some of their arguments)
from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from async_tests import HANG_SECONDS
from common.artifacts import Canvas, Prompt
from common.errors import Cancelled, InternalError, InvalidInput, Unavailable
from common.local import HostedStages, LocalRunner
from common.pipeline import run_pipeline
from common.stage import Call, Contract, PipelineStage

Work = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


class Value:
    """A value whose deallocation the test can observe."""


@dataclass
class FakeRunner:
    """A runner that reads and writes slots with these names; `work` computes the outputs."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    work: Work | None = None

    @property
    def contract(self) -> Contract:
        """Every slot is a Prompt."""
        return Contract(self.name, dict.fromkeys(self.reads, "Prompt"), dict.fromkeys(self.writes, "Prompt"))

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        """Run `work`; without it, each output is a text that lists the inputs."""
        if self.work is not None:
            return await self.work(values)
        return {name: f"{self.name}({','.join(map(str, values.values()))})" for name in self.writes}


def run(*runners: FakeRunner, wanted: tuple[str, ...] = ("media",), **values: Any) -> dict[str, Any]:
    outputs: dict[str, Any] = run_in_time(run_pipeline(runners, values, Call("test"), wanted=wanted))
    return outputs


def run_in_time(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine with a timeout, so that a pipeline that hangs fails its test."""

    async def bounded() -> Any:
        async with asyncio.timeout(HANG_SECONDS):
            return await coroutine

    return asyncio.run(bounded())


def test_values_reach_their_readers_in_any_order_of_runners() -> None:
    encode, decode = FakeRunner("encode", ("prompt",), ("text",)), FakeRunner("decode", ("text", "canvas"), ("media",))
    for runners in ((encode, decode), (decode, encode)):
        assert run(*runners, prompt="p", canvas="c") == {"media": "decode(encode(p),c)"}


def test_a_given_value_may_be_wanted_and_an_output_unread() -> None:
    runner = FakeRunner("encode", ("prompt",), ("text", "unread"))
    assert run(runner, wanted=("prompt", "text"), prompt="p") == {"prompt": "p", "text": "encode(p)"}


def test_an_optional_slot_without_a_writer_is_omitted() -> None:
    assert run(FakeRunner("decode", ("image", "latents"), ("media",)), latents="l") == {"media": "decode(l)"}


def test_independent_stages_overlap() -> None:
    """Each stage waits until the other stage has started; sequential execution would deadlock."""
    began = {"text": asyncio.Event(), "noise": asyncio.Event()}

    def rendezvous(own: str, other: str) -> Work:
        async def work(values: Mapping[str, Any]) -> Mapping[str, Any]:
            began[own].set()
            await began[other].wait()
            return {own: own}

        return work

    assert run(
        FakeRunner("encode", ("prompt",), ("text",), rendezvous("text", "noise")),
        FakeRunner("prepare", ("prompt",), ("noise",), rendezvous("noise", "text")),
        FakeRunner("denoise", ("text", "noise"), ("media",)),
        prompt="p",
    ) == {"media": "denoise(text,noise)"}


def test_a_value_is_dropped_after_its_last_reader() -> None:
    alive: dict[str, weakref.ref[Value]] = {}
    seen: dict[str, list[str]] = {}

    def record(name: str, *writes: str) -> Work:
        async def work(values: Mapping[str, Any]) -> Mapping[str, Any]:
            gc.collect()
            seen[name] = sorted(slot for slot, value in alive.items() if value() is not None)
            outputs = {slot: Value() for slot in writes}
            alive.update({slot: weakref.ref(value) for slot, value in outputs.items()})
            return outputs

        return work

    outputs = run(
        FakeRunner("encode", ("prompt",), ("text", "unread"), record("encode", "text", "unread")),
        FakeRunner("first", ("text",), ("noise",), record("first", "noise")),
        FakeRunner("second", ("text", "noise"), ("latents",), record("second", "latents")),
        FakeRunner("decode", ("latents",), ("media",), record("decode", "media")),
        prompt="p",
    )
    assert seen == {"encode": [], "first": ["text"], "second": ["noise", "text"], "decode": ["latents"]}
    assert isinstance(outputs["media"], Value)


async def _wait_forever(_: Mapping[str, Any]) -> Mapping[str, Any]:
    await asyncio.Event().wait()
    return {}


def test_the_first_error_is_raised_unchanged_and_ends_the_other_stages() -> None:
    ended = []

    async def fail(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise InvalidInput("too dark", field="prompt")

    async def fail_at_the_end(_: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return await _wait_forever({})
        finally:
            ended.append("prepare")
            raise Unavailable("the worker is lost")

    with pytest.raises(InvalidInput, match="too dark") as refused:
        run(
            FakeRunner("prepare", ("prompt",), ("noise",), fail_at_the_end),
            FakeRunner("encode", ("prompt",), ("text",), fail),
            FakeRunner("denoise", ("text", "noise"), ("media",)),
            prompt="p",
        )
    assert refused.value.field == "prompt"
    assert ended == ["prepare"]


def test_a_failure_does_not_cancel_the_callers_task() -> None:
    """The caller can retry, for instance under a timeout."""

    async def fail(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise Unavailable("the worker is lost")

    async def scenario() -> None:
        with pytest.raises(Unavailable):
            await run_pipeline([FakeRunner("encode", (), ("media",), fail)], {}, Call("test"), wanted=("media",))
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    run_in_time(scenario())


def test_a_runner_that_cancels_itself_ends_the_pipeline() -> None:
    async def give_up(_: Mapping[str, Any]) -> Mapping[str, Any]:
        raise asyncio.CancelledError

    with pytest.raises(Cancelled, match="encode was cancelled"):
        run(
            FakeRunner("encode", ("prompt",), ("text",), give_up),
            FakeRunner("decode", ("text",), ("media",)),
            prompt="p",
        )


def test_the_error_names_a_runner_that_omits_an_output() -> None:
    async def omit_schedule(_: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"noise": 1}

    with pytest.raises(InternalError, match="prepare did not return schedule"):
        run(FakeRunner("prepare", (), ("noise", "schedule"), omit_schedule), wanted=("noise",))


@pytest.mark.parametrize("reply", [asyncio.CancelledError(), Unavailable("the channel closed")])
def test_a_cancelled_caller_sees_its_own_cancellation(reply: BaseException) -> None:
    """The caller gets its CancelledError even if the runner raises another error on cancellation."""

    async def scenario() -> None:
        began = asyncio.Event()

        async def work(_: Mapping[str, Any]) -> Mapping[str, Any]:
            began.set()
            try:
                return await _wait_forever({})
            except asyncio.CancelledError:
                raise reply from None

        runner = FakeRunner("denoise", (), ("media",), work)
        task = asyncio.create_task(run_pipeline([runner], {}, Call("test"), wanted=("media",)))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run_in_time(scenario())


@dataclass(frozen=True, kw_only=True)
class WaitInput:
    prompt: Prompt
    canvas: Canvas | None = None


@dataclass(frozen=True, kw_only=True)
class WaitOutput:
    media: Prompt


class WaitStage(PipelineStage[WaitInput, WaitOutput]):
    """Calls `began`, waits for cancellation, and then sets `stopped`."""

    def __init__(self, began: Callable[[], object], stopped: threading.Event) -> None:
        self._began = began
        self._stopped = stopped

    def run(self, x: WaitInput, call: Call) -> WaitOutput:
        """Never returns."""
        self._began()
        call.cancelled.wait(10)
        try:
            call.progress(1, 2)
        except Cancelled:
            self._stopped.set()
            raise
        raise AssertionError("the stage was not cancelled")


def test_cancelling_reaches_a_stage_on_its_thread() -> None:
    async def scenario() -> None:
        loop, began, stopped = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        stage = WaitStage(lambda: loop.call_soon_threadsafe(began.set), stopped)
        with ThreadPoolExecutor(1) as executor:
            runner = LocalRunner(HostedStages("wait", [stage]), executor)
            assert runner.contract.optional == {"canvas"}
            values = {"prompt": Prompt(prompt="p")}
            task = asyncio.create_task(run_pipeline([runner], values, Call("test"), wanted=("media",)))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(stopped.wait, 10)

    run_in_time(scenario())
