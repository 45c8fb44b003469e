"""Starts the ranks of a worker group on this machine, and starts them again when one is lost.

It is the elastic agent that torchrun runs. Added here is what a service needs beside a training run: a rank that is
stopped is noticed, ranks that hang in a collective are not waited for, new starts are spaced out and counted anew once
the group has served for a while, and no rank outlives the agent.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from common.logs import get_logger
from common.tether import tethered
from services.denoising.joining import GROUP_TOKEN
from services.denoising.meeting import Meeting
from services.denoising.settings import SERVICE, DenoisingSettings

BAD_INPUT = 2
"""Exit code of a rank that was refused something which starting again does not change, such as its checkpoint."""

_MONITOR_SECONDS = 0.2
_UNWIND_SECONDS = 1.0  # that ranks get to notice by themselves that one of them has gone, and to say so
_STEADY_SECONDS = 60.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_FAREWELL_SECONDS = 2.0  # for other machines' agents, where all ranks have ended
_MARGIN_SECONDS = 8.0  # beyond settings.grace_seconds

_log = get_logger(__name__)


def launch(settings: DenoisingSettings, flags: Sequence[str]) -> int:
    """Run this machine's ranks of the group until SIGTERM or SIGINT; returns the exit code.

    0: told to end, and all ranks finished what they were at. 2: a rank ended with that. 1: given up after
    settings.max_restarts, or a rank had to be killed.
    """
    _silence("torch.distributed.elastic")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    agent = GroupAgent(settings, flags)
    try:
        failed = agent.run().is_failed()
    except SignalException:
        return 1 if any(agent.exit_codes().values()) else 0
    if failed:
        _log.error("worker group has ended for good", exit_codes=agent.exit_codes())
        return BAD_INPUT if BAD_INPUT in agent.exit_codes().values() else 1
    return 0


def _silence(package: str) -> None:
    """Let a package log nothing: what torch says about ranks that end is less than the lines here."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _leave(*_: object) -> NoReturn:
    """Told to end before there are ranks. Once there are some, the agent has a handler of its own."""
    raise SystemExit(0)


class GroupAgent(LocalElasticAgent):
    """Keeps the ranks of one machine running. It starts them by the command line that it was started by itself."""

    def __init__(self, settings: DenoisingSettings, flags: Sequence[str]) -> None:
        self._meeting = Meeting(settings.nnodes, settings.node_rank, settings.rdzv_endpoint)
        command = tethered([sys.executable, "-m", "services.denoising", *flags])
        spec = WorkerSpec(
            role=SERVICE,
            local_world_size=settings.ranks_per_node,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=self._meeting,
            max_restarts=settings.max_restarts,
            monitor_interval=_MONITOR_SECONDS,
        )
        super().__init__(spec, _Inherited(), exit_barrier_timeout=_FAREWELL_SECONDS)
        self._shutdown_seconds = int(settings.grace_seconds + _MARGIN_SECONDS)
        self._lost_seconds = settings.rank_lost_seconds
        self._stopped_since: dict[int, float] = {}
        self._began = 0.0
        self._delay = _FIRST_DELAY

    def exit_codes(self) -> dict[int, int | None]:
        """How the ranks of the latest start ended; None for one that runs."""
        workers = self._worker_group.workers
        return {workers[local].global_rank: each.proc.poll() for local, each in self._handlers().items()}

    def _handlers(self) -> dict[int, SubprocessHandler]:
        """The processes, by local rank."""
        return self._pcontext.subprocess_handlers if isinstance(self._pcontext, SubprocessContext) else {}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other machines' agents; the processes of an earlier start have ended."""
        self._pcontext = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the ranks, with the token by which they know each other."""
        os.environ[GROUP_TOKEN] = self._meeting.token
        pids: dict[int, Any] = super()._start_workers(worker_group)
        for local, pid in pids.items():
            _log.info("rank started", rank=worker_group.workers[local].global_rank, pid=pid)
        self._stopped_since.clear()
        self._began = time.monotonic()
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Look after the ranks, and end all of them when one has failed: what it left undone, they wait for."""
        self._kill_stopped()
        codes = self.exit_codes()
        if failed := {rank: code for rank, code in codes.items() if code}:
            _log.error("ranks have ended", exit_codes=failed)
            self._end_the_others()
            if BAD_INPUT in self.exit_codes().values():
                self._remaining_restarts = 0
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """End the ranks, which get the time that finishing takes."""
        del timeout  # An agent's own, which it can be told from torch 2.13 on only.
        if self._pcontext is not None:
            self._pcontext.close(death_sig, self._shutdown_seconds)
        super()._shutdown(death_sig)

    def _kill_stopped(self) -> None:
        """Kill a rank that has been stopped for too long; one that is not connected yet is missed by nobody else."""
        now = time.monotonic()
        for local, each in self._handlers().items():
            if each.proc.poll() is not None or not _is_stopped(each.proc.pid):
                self._stopped_since.pop(local, None)
            elif now - self._stopped_since.setdefault(local, now) > self._lost_seconds:
                _log.error("rank is stopped, killing it", pid=each.proc.pid, seconds=self._lost_seconds)
                each.close(signal.SIGKILL)

    def _end_the_others(self) -> None:
        deadline = time.monotonic() + _UNWIND_SECONDS
        for each in self._handlers().values():
            try:
                each.proc.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("killing a rank that is stopped, or waits for a rank that has ended", pid=each.proc.pid)
                each.close(signal.SIGKILL)
                each.proc.wait()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Start all ranks of this machine again, after a pause that grows while starts fail."""
        if time.monotonic() - self._began > _STEADY_SECONDS:
            self._remaining_restarts = max(0, worker_group.spec.max_restarts - 1)
            self._delay = _FIRST_DELAY
        self._end_the_others()  # Some still run where another machine has lost a rank: they wait for it.
        _log.warning("worker group restarts", seconds=self._delay, restarts_left=self._remaining_restarts)
        time.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        super()._restart_workers(worker_group)


def _is_stopped(pid: int) -> bool:
    """Whether a child of this process is stopped, as by SIGSTOP. It stays to be waited for."""
    if sys.platform != "linux":
        return False  # Only the ranks' own side channel notices there.
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return found is not None and found.si_code == os.CLD_STOPPED


class _Inherited(LogsSpecs):
    """Ranks write where the agent writes."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """No files."""
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=dict(nowhere), error_files=dict(nowhere))

    @property
    def root_log_dir(self) -> str:
        """None."""
        return os.devnull
