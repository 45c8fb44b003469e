"""Starts the ranks of a worker group on this host, and restarts them when a rank is lost.

It extends torchrun's elastic agent for a long-running service: it detects stopped ranks, kills ranks that hang in a
collective, delays restarts with backoff, resets the restart count after a minute without a restart, and ends all ranks
when the agent ends.
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
"""Exit code of a rank after an error that a restart does not resolve, such as a bad checkpoint."""

_MONITOR_SECONDS = 0.2

_UNWIND_SECONDS = 1.0
"""Time, in seconds, for ranks to detect and report the loss of a rank before they are killed."""

_STEADY_SECONDS = 60.0
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0

_FAREWELL_SECONDS = 2.0
"""Time, in seconds, to wait for the agents of other hosts after all ranks have exited."""

_MARGIN_SECONDS = 8.0
"""Time, in seconds, beyond settings.grace_seconds before ranks are killed at shutdown."""


_log = get_logger(__name__)


def launch(settings: DenoisingSettings, flags: Sequence[str]) -> int:
    """Run this host's ranks of the group until SIGTERM or SIGINT; returns the exit code.

    0: a signal stopped the group, and all ranks finished their calls. 1: max_restarts is exhausted, or a rank was
    killed. 2: a rank exited with 2.
    """
    _silence("torch.distributed.elastic")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    agent = GroupAgent(settings, flags)
    try:
        failed = agent.run().is_failed()
    except SignalException:
        return 1 if any(agent.exit_codes().values()) else 0
    if failed:
        _log.error("worker group failed permanently", exit_codes=agent.exit_codes())
        return BAD_INPUT if BAD_INPUT in agent.exit_codes().values() else 1
    return 0


def _silence(package: str) -> None:
    """Disable the loggers of a package, because this module logs exits of ranks in more detail than torch."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _exit(*_: object) -> NoReturn:
    """Exit on a signal before the ranks start. When they start, the agent installs its own handler."""
    raise SystemExit(0)


class GroupAgent(LocalElasticAgent):
    """Supervises the ranks of one host. Starts them with the flags of this process."""

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
        """Exit codes of the ranks of the latest start; None for a running rank."""
        workers = self._worker_group.workers
        return {workers[local].global_rank: each.proc.poll() for local, each in self._handlers().items()}

    def _handlers(self) -> dict[int, SubprocessHandler]:
        """The rank processes by local rank."""
        return self._pcontext.subprocess_handlers if isinstance(self._pcontext, SubprocessContext) else {}

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Rendezvous with the agents of other hosts, after the ranks of an earlier start have exited."""
        self._pcontext = None
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the ranks, with the token that authenticates them to each other."""
        os.environ[GROUP_TOKEN] = self._meeting.token
        pids: dict[int, Any] = super()._start_workers(worker_group)
        for local, pid in pids.items():
            _log.info("rank started", rank=worker_group.workers[local].global_rank, pid=pid)
        self._stopped_since.clear()
        self._began = time.monotonic()
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Check the ranks. If a rank has failed, stop all ranks, because they wait for it in a collective."""
        self._kill_stopped()
        codes = self.exit_codes()
        if failed := {rank: code for rank, code in codes.items() if code}:
            _log.error("ranks exited", exit_codes=failed)
            self._stop_ranks()
            if BAD_INPUT in self.exit_codes().values():
                self._remaining_restarts = 0
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Stop the ranks, with time to finish their calls."""
        del timeout  # The agent sets its own timeout; only torch 2.13 and later pass a timeout.
        if self._pcontext is not None:
            self._pcontext.close(death_sig, self._shutdown_seconds)
        super()._shutdown(death_sig)

    def _kill_stopped(self) -> None:
        """Kill ranks that are stopped for more than `rank_lost_seconds`.

        Heartbeats do not detect a rank that is stopped before it joins.
        """
        now = time.monotonic()
        for local, each in self._handlers().items():
            if each.proc.poll() is not None or not _is_stopped(each.proc.pid):
                self._stopped_since.pop(local, None)
            elif now - self._stopped_since.setdefault(local, now) > self._lost_seconds:
                _log.error("killing a stopped rank", pid=each.proc.pid, seconds=self._lost_seconds)
                each.close(signal.SIGKILL)

    def _stop_ranks(self) -> None:
        deadline = time.monotonic() + _UNWIND_SECONDS
        for each in self._handlers().values():
            try:
                each.proc.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("killing a rank that is stopped or hangs in a collective", pid=each.proc.pid)
                each.close(signal.SIGKILL)
                each.proc.wait()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Restart all ranks of this host, after a delay that grows while starts fail."""
        if time.monotonic() - self._began > _STEADY_SECONDS:
            self._remaining_restarts = max(0, worker_group.spec.max_restarts - 1)
            self._delay = _FIRST_DELAY
        self._stop_ranks()  # After a loss on another host, ranks here may still wait in a collective.
        _log.warning("worker group restarts", seconds=self._delay, restarts_left=self._remaining_restarts)
        time.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY)
        super()._restart_workers(worker_group)


def _is_stopped(pid: int) -> bool:
    """Whether a child process is stopped, for example by SIGSTOP. Does not reap the child (WNOWAIT)."""
    if sys.platform != "linux":
        return False  # On other systems, only the heartbeats of the ranks detect a stopped rank.
    try:
        found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return found is not None and found.si_code == os.CLD_STOPPED


class _Inherited(LogsSpecs):
    """Log settings: ranks inherit the agent's stdout and stderr."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return no log files."""
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=dict(nowhere), error_files=dict(nowhere))

    @property
    def root_log_dir(self) -> str:
        """The null device: there is no log directory."""
        return os.devnull
