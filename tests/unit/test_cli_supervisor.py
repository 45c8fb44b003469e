"""What `fleet up` does about processes that end, and how programs end on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from services.cli import supervisor
from services.cli.options import INTERRUPTED, let_threads_sleep, run_async
from services.cli.supervisor import Program, ServiceEnded, Supervisor

# Ends at once with exit code 2, as a service whose settings are wrong does.
WRONG = Program("wrong", ("serve", "nothing"))


def test_a_program_that_ends_before_the_fleet_is_ready_ends_the_fleet() -> None:
    notes: list[str] = []
    with pytest.raises(ServiceEnded, match=r"wrong .* ended with exit code 2 before the fleet was ready") as caught:
        asyncio.run(Supervisor(notes.append).keep(WRONG))
    assert caught.value.code == 2
    assert len(notes) == 1


def test_a_program_that_always_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervisor, "_MOST_DEATHS", 3)
    notes: list[str] = []
    keeper = Supervisor(notes.append)
    keeper.ready = True
    with pytest.raises(ServiceEnded, match="3 times in a row"):
        asyncio.run(keeper.keep(WRONG))
    assert [note.split(": ")[1].split(",")[0] for note in notes if "started" in note] == ["started"] * 3
    assert sum("starting it again" in note for note in notes) == 2


def test_a_program_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.05)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"

    async def start(_: Program) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", stubborn, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
        return process

    async def run() -> int:
        pids: list[int] = []
        started = asyncio.Event()

        def note(text: str) -> None:
            pids.append(int(text.rpartition(" ")[2]))
            started.set()

        keeper = Supervisor(note)
        keeping = asyncio.create_task(keeper.keep(Program("deaf", ())))
        await started.wait()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await keeper.stop(["deaf", "unknown"])
        return pids[0]

    monkeypatch.setattr(supervisor, "_start", start)
    assert not psutil.pid_exists(asyncio.run(run()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_program_clean_up(number: signal.Signals, code: int) -> None:
    cleaned: list[bool] = []

    async def program() -> int:
        os.kill(os.getpid(), number)
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)
        return 0

    assert run_async(program()) == code
    assert cleaned == [True]


def test_openmp_threads_sleep_unless_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
