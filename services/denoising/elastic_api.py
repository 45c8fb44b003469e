"""The API of torch.distributed.elastic that the launcher uses, most of it private."""

from __future__ import annotations

from common.package_guard import Abstract, Attributes, Called, Parameters, PrivateApi

_ELASTIC = "torch.distributed.elastic"
_API = f"{_ELASTIC}.agent.server.api"
_AGENT = f"{_ELASTIC}.agent.server.local_elastic_agent:LocalElasticAgent"
_PROCESSES = f"{_ELASTIC}.multiprocessing"
_SUBPROCESSES = f"{_PROCESSES}.api:SubprocessContext"
_HANDLER = f"{_PROCESSES}.subprocess_handler:SubprocessHandler"
_RENDEZVOUS = f"{_ELASTIC}.rendezvous"

_SPEC = ("role", "local_world_size", "entrypoint", "args", "rdzv_handler", "max_restarts", "monitor_interval")
_OF_GROUP = ("self", "worker_group")
_MEETING = (
    "get_backend",
    "get_run_id",
    "is_closed",
    "next_rendezvous",
    "num_nodes_waiting",
    "set_closed",
    "shutdown",
    "use_agent_store",
)

ELASTIC = PrivateApi(
    "torch",
    "a worker group",
    (
        Called(f"{_API}:WorkerSpec", 0, _SPEC),
        Attributes(f"{_API}:WorkerGroup", ("spec", "workers")),
        Attributes(f"{_API}:Worker", ("global_rank",)),
        Called(f"{_API}:RunResult.is_failed", 1),
        Called(_AGENT, 2, ("exit_barrier_timeout",)),
        Called(f"{_AGENT}.run", 1),
        Abstract(_AGENT, ()),
        Attributes(_AGENT, ("_pcontext", "_remaining_restarts", "_worker_group")),
        Parameters(f"{_AGENT}._rendezvous", _OF_GROUP),
        Parameters(f"{_AGENT}._start_workers", _OF_GROUP),
        Parameters(f"{_AGENT}._monitor_workers", _OF_GROUP),
        Parameters(f"{_AGENT}._restart_workers", _OF_GROUP),
        Parameters(f"{_AGENT}._shutdown", ("self", "death_sig"), ("timeout",)),
        Abstract(f"{_PROCESSES}:LogsSpecs", ("reify", "root_log_dir")),
        Parameters(f"{_PROCESSES}:LogsSpecs.reify", ("self", "envs")),
        Called(f"{_PROCESSES}:LogsDest", 0, ("stdouts", "stderrs", "error_files")),
        Called(f"{_PROCESSES}:SignalException", 2),
        Attributes(_SUBPROCESSES, ("subprocess_handlers",)),
        Called(f"{_SUBPROCESSES}.close", 3),
        Attributes(_HANDLER, ("proc",)),
        Called(f"{_HANDLER}.close", 2),
        Abstract(f"{_RENDEZVOUS}:RendezvousHandler", _MEETING),
        Called(f"{_RENDEZVOUS}:RendezvousInfo", 4),
        Called(f"{_RENDEZVOUS}.api:RendezvousStoreInfo", 2),
    ),
)
"""Names, parameters and attributes used by services.denoising.launcher and services.denoising.meeting."""
