"""Supervision of processes by `fleet up`, and shutdown of commands on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import psutil
import pytest

from async_tests import HANG_SECONDS
from services.cli import supervisor
from services.cli.options import INTERRUPTED, let_threads_sleep, run_async
from services.cli.supervisor import Program, ServiceEnded, Supervisor
from services.cli.worker_pool import WorkerPool

# Exits at once with code 2, as a service with invalid settings does.
WRONG = Program("wrong", ("serve", "nothing"))
DYING = Program("dying", ())


def test_an_exit_before_readiness_ends_the_fleet() -> None:
    notes: list[str] = []
    with pytest.raises(ServiceEnded, match=r"wrong .* ended with exit code 2 before the fleet was ready") as caught:
        asyncio.run(Supervisor(notes.append).supervise(WRONG))
    assert caught.value.code == 2
    assert len(notes) == 1


class Processes:
    """Starts Python processes that wait for a signal, in place of services.

    A program with "ignoring" in its name ignores SIGTERM. "dying" exits with code 1, "wrong" with code 2, and "killed"
    sends itself SIGKILL.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        monkeypatch.setattr(supervisor, "_start", self._start)

    async def _start(self, program: Program) -> asyncio.subprocess.Process:
        handler = "SIG_IGN" if "ignoring" in program.name else "SIG_DFL"
        ends = {
            "dying": "raise SystemExit(1)",
            "wrong": "raise SystemExit(2)",
            "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        }
        last_statement = ends.get(program.name, "signal.pause()")
        ignore_or_end = f"signal.signal(signal.SIGTERM, signal.{handler})"
        code = f"import os, signal; {ignore_or_end}; print('up', flush=True); {last_statement}"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
        self.started.append(program.name)
        return process

    async def have_started(self, count: int) -> None:
        """Wait until `count` programs in total have started."""
        async with asyncio.timeout(HANG_SECONDS):
            while len(self.started) < count:  # noqa: ASYNC110 -- the processes send no event
                await asyncio.sleep(0.005)


def test_restarts_end_after_the_maximum_number_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervisor, "_MOST_FAILURES", 3)
    processes, notes = Processes(monkeypatch), list[str]()
    parent = Supervisor(notes.append)
    parent.ready = True
    with pytest.raises(ServiceEnded, match="exit code 1, 3 times in a row"):
        asyncio.run(parent.supervise(DYING))
    assert processes.started == ["dying"] * 3
    assert [note.rpartition(" in ")[2] for note in notes if "restarting it" in note] == ["0.001 s", "0.002 s"]


def test_a_killed_program_is_restarted_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervisor, "_LONGEST_DELAY", 0.002)
    monkeypatch.setattr(supervisor, "_MOST_FAILURES", 2)
    processes, notes = Processes(monkeypatch), list[str]()

    async def run() -> None:
        parent, program = Supervisor(notes.append), Program("killed", ())
        parent.ready = True
        task = asyncio.create_task(parent.supervise(program))
        await processes.have_started(5)
        parent.retire(program)
        await asyncio.wait_for(task, HANG_SECONDS)

    asyncio.run(run())
    delays = [note.rpartition(" in ")[2] for note in notes if "restarting it" in note]
    assert delays[:4] == ["0.001 s", "0.002 s", "0.002 s", "0.002 s"]


def test_exit_code_2_ends_a_running_fleet_without_a_restart() -> None:
    notes: list[str] = []
    parent = Supervisor(notes.append)
    parent.ready = True
    with pytest.raises(ServiceEnded, match=r"wrong .* exit code 2; a restart does not help") as caught:
        asyncio.run(parent.supervise(WRONG))
    assert caught.value.code == 2
    assert len(notes) == 1


def test_a_program_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.05)
    source = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ignoring', flush=True); signal.pause()"
    )

    async def start(_: Program) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
        return process

    async def run() -> int:
        pids: list[int] = []
        started = asyncio.Event()

        def note(text: str) -> None:
            pids.append(int(text.rpartition(" ")[2]))
            started.set()

        parent = Supervisor(note)
        task = asyncio.create_task(parent.supervise(Program("ignoring", ())))
        await started.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await parent.stop(["ignoring", "unknown"])
        return pids[0]

    monkeypatch.setattr(supervisor, "_start", start)
    assert not psutil.pid_exists(asyncio.run(run()))


def test_a_retired_program_is_not_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, notes = Processes(monkeypatch), list[str]()

    async def run() -> None:
        parent, program = Supervisor(notes.append), Program("w-0", ())
        task = asyncio.create_task(parent.supervise(program))
        await processes.have_started(1)
        await asyncio.sleep(0.05)
        parent.retire(program)
        await asyncio.wait_for(task, HANG_SECONDS)
        assert parent.running == []

    asyncio.run(run())
    assert processes.started == ["w-0"]
    assert notes[-1].endswith("ended with signal SIGTERM; it is no longer needed")


def test_a_retired_program_that_ignores_sigterm_is_killed_after_the_grace_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.1)
    processes, notes = Processes(monkeypatch), list[str]()

    async def run() -> None:
        parent, program = Supervisor(notes.append), Program("ignoring-0", ())
        task = asyncio.create_task(parent.supervise(program))
        await processes.have_started(1)
        parent.retire(program)
        await asyncio.wait_for(task, HANG_SECONDS)

    asyncio.run(run())
    assert notes[-1].endswith("ended with signal SIGKILL; it is no longer needed")


def test_a_program_retired_before_its_start_or_restart_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "_FIRST_DELAY", 1_000.0)
    notes: list[str] = []
    Processes(monkeypatch)

    async def run() -> None:
        parent = Supervisor(notes.append)
        parent.ready = True
        parent.retire(DYING)
        await asyncio.wait_for(parent.supervise(DYING), HANG_SECONDS)
        assert notes == []
        task = asyncio.create_task(parent.supervise(DYING))
        async with asyncio.timeout(HANG_SECONDS):
            while not notes or "restarting it" not in notes[-1]:  # noqa: ASYNC110 -- the process sends no event
                await asyncio.sleep(0.005)
        parent.retire(DYING)
        await asyncio.wait_for(task, HANG_SECONDS)

    asyncio.run(run())


def test_a_pool_stops_its_newest_workers_and_reuses_their_numbers_after_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes = Processes(monkeypatch)

    async def run() -> None:
        parent = Supervisor(lambda _: None)
        async with asyncio.timeout(HANG_SECONDS), asyncio.TaskGroup() as group:
            names = ("w-0", "w-1", "ignoring-2", "w-3")
            pool = WorkerPool(parent, group.create_task, lambda number: Program(names[number], ()), print)
            pool.resize(3)
            await processes.have_started(3)
            pool.resize(1)
            assert pool.size == 1
            while sorted(parent.running) != ["ignoring-2", "w-0"]:  # noqa: ASYNC110 -- the process sends no event
                await asyncio.sleep(0.005)
            pool.resize(3)  # worker 2 has not exited yet
            await processes.have_started(5)
            assert processes.started[3:] == ["w-1", "w-3"] or processes.started[3:] == ["w-3", "w-1"]
            pool.resize(0)
            assert pool.size == 0
            monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.1)
            await parent.stop(parent.running)

    asyncio.run(run())
    assert sorted(processes.started) == ["ignoring-2", "w-0", "w-1", "w-1", "w-3"]


def test_a_pool_continues_without_a_broken_worker_while_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes, notes = Processes(monkeypatch), list[str]()

    async def run(*names: str) -> None:
        parent = Supervisor(lambda _: None)
        parent.ready = True
        async with asyncio.timeout(HANG_SECONDS), asyncio.TaskGroup() as group:
            pool = WorkerPool(parent, group.create_task, lambda number: Program(names[number], ()), notes.append)
            pool.resize(len(names))
            while pool.size == len(names):  # noqa: ASYNC110 -- the process sends no event
                await asyncio.sleep(0.005)
            assert (pool.size, pool.most) == (1, 1)
            pool.resize(0)

    asyncio.run(run("w-0", "wrong"))
    assert sorted(processes.started) == ["w-0", "wrong"]
    assert len(notes) == 1
    assert "exit code 2" in notes[0]
    assert notes[0].endswith("the service continues with 1 of its workers")
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(run("wrong"))
    assert caught.group_contains(ServiceEnded, match="wrong .* exit code 2")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 143)])
def test_a_signal_runs_cleanup_before_exit(number: signal.Signals, code: int) -> None:
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


def test_openmp_wait_policy_defaults_to_passive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
