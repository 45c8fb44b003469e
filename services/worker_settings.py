"""Settings of the stage services, by what a service does, and the device and element type that they select.

Each service has only the settings that it reads; SETTINGS in its module (services.cli.serve) is its class.

    WorkerSettings      every stage service reads these; latent_preparation has no others
    CachingSettings     replies can be cached: text_encoding
    KernelSettings      modules use optional kernel packages on a GPU: image_encoding, decoding, denoising
    StepSettings        stages report steps: before_denoising, decoding, denoising
    WarmUpSettings      StepSettings, and made-up requests at the start: before_denoising, denoising
    DecodingSettings    KernelSettings and StepSettings
    LoopSettings        a denoising loop: DenoisingSettings in services.denoising.settings adds the worker group
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common.errors import FailedPrecondition, InvalidInput
from common.rpc.tls import TlsSettings
from common.rpc.watchdog import HangLimits
from common.settings import setting
from common.stage import Contract
from common.state.store_server import StoreSettings
from configs.approximation import EXACT, Approximation
from models.catalog import DEFAULT_MODEL
from models.kernels.packages import AttentionChoice, KernelChoice, PackageChoice
from models.parallel.mesh import WorkerMesh
from models.runtime import DEFAULT_STEP_MEMORY_BYTES, Runtime

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(StoreSettings, TlsSettings):
    """Serve one stage of one model."""

    model: str = setting(
        DEFAULT_MODEL, help="what to serve: a Diffusers directory, NAME=DIR, or the name of a shipped model"
    )
    redis: str = setting(help="URL of the request store, to announce this worker in")
    listen: str = setting("127.0.0.1:0", help="address to listen on: HOST:PORT (port 0: a free one), or unix:PATH")
    advertise: str = setting("", help="address under which coordinators reach this worker, where it is not --listen")
    device: str = setting("auto", help="where to compute: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", help="what to compute in; auto is bfloat16 on CUDA and float32 elsewhere"
    )
    threads: int = setting(0, help="CPU threads that an operation may use; 0 leaves that to torch")
    capacity: int = setting(1, help="requests taken at a time; they compute one after the other")
    plugins: tuple[Path, ...] = setting((), help="directories with pipelines of other families")
    grace_seconds: float = setting(
        30.0, help="time that running calls get to finish, or to be handed over, after SIGTERM"
    )
    announce_seconds: float = setting(60.0, help="how long to wait for the request store at the start")
    idle_seconds: float = setting(30.0, help="give up on a caller that is silent for so long within its inputs")
    max_call_bytes: int = setting(2 << 30, help="most bytes of tensors that a call may carry")
    tls_callers: tuple[str, ...] = setting(("coordinator",), help="names in the certificates of those who may call")
    metrics_port: int | None = setting(None, help="port for Prometheus metrics; without one there are none")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="least severe log lines to write")
    log_format: Literal["text", "json"] = setting(
        "text", help="format of log lines: text, or json with one object a line for collectors"
    )

    def places(self, contract: Contract) -> int:
        """Requests taken at a time by stages with this contract."""
        del contract
        return self.capacity

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The process in which the service's stages run."""
        return Runtime(device=device, dtype=dtype, mesh=mesh)

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages; None for a service whose stages use none of them.

        Raises InvalidInput for a contradiction.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class CachingSettings(WorkerSettings):
    """Serve a stage whose replies are cached, such as the text encoding."""

    reply_cache_bytes: int = setting(256 << 20, help="memory for replies, returned again for equal inputs; 0: none")
    reply_cache_redis_bytes: int = setting(
        0, help="memory of the request store for replies shared with other workers; 0: none"
    )
    reply_cache_redis_seconds: float = setting(3_600.0, help="time from the last use of a shared reply to its end")
    reply_cache_redis_gain: float = setting(
        2.0, help="share replies that take so many times longer to compute than to fetch, as measured; 0: all"
    )


@dataclass(frozen=True, kw_only=True)
class KernelSettings(WorkerSettings):
    """Serve a stage whose modules use optional kernel packages on a GPU, such as the image encoding."""

    kernels: tuple[PackageChoice, ...] = setting(
        ("auto",), help="kernel packages of a GPU worker: auto uses those that work, a named one must work; or none"
    )
    kernel_cache: Path | None = setting(None, help="directory of compiled kernels, kept from one start to the next")

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages. Raises InvalidInput for a contradiction."""
        return KernelChoice(self.kernels)


@dataclass(frozen=True, kw_only=True)
class StepSettings(WorkerSettings):
    """Serve a stage that reports its steps."""

    hang_seconds: float = setting(60.0, help="cancel a call that makes no step for so long after its first one")
    hang_mean_steps: float = setting(20.0, help="but not before so many times its mean seconds per step")
    hang_exit_seconds: float = setting(30.0, help="end the process if the device thread goes on so long after that")
    step_seconds: float = setting(0.25, help="shortest time between two reported steps of a call")

    @property
    def hang_limits(self) -> HangLimits:
        """Bounds after which a call counts as stuck. Raises InvalidInput for a bound that is not more than 0."""
        return HangLimits(
            seconds=self.hang_seconds, mean_steps=self.hang_mean_steps, exit_seconds=self.hang_exit_seconds
        )


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings(StepSettings):
    """Serve a stage that can run made-up requests at the start, such as the one before denoising."""

    warm_up: tuple[str, ...] = setting(
        (), help="size to be warm for at the start: HEIGHTxWIDTH, or with xFRAMES; for one variant alone with @VARIANT"
    )


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(KernelSettings, StepSettings):
    """Serve the decoding of one model."""

    sessions: int = setting(
        4, help="videos decoded at a time of a model that streams their latents; capacity does not count then"
    )

    def places(self, contract: Contract) -> int:
        """Sessions wait for items most of the time, and alternate on the device."""
        return self.sessions if contract.input_streams else self.capacity


@dataclass(frozen=True, kw_only=True)
class LoopSettings(KernelSettings, StepSettings):
    """Serve a denoising loop."""

    attention_backend: AttentionChoice = setting(
        "auto", help="attention on a GPU; auto uses the committed table, a named backend must work"
    )
    step_checkpoint_every: int = setting(0, help="denoising steps between two step checkpoints; 0: by time only")
    step_checkpoint_seconds: float = setting(5.0, help="longest time between two step checkpoints; 0: by steps only")
    step_memory_bytes: int = setting(
        DEFAULT_STEP_MEMORY_BYTES,
        help="bytes of CUDA graphs, of their inputs, and of memory that denoising steps update in place",
    )

    @property
    def approximation(self) -> Approximation:
        """Deviations from the exact computation that the loop may use."""
        return EXACT

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages and attention backend. Raises InvalidInput for a contradiction."""
        return KernelChoice(self.kernels, self.attention_backend)

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The process in which the loop runs."""
        return replace(
            super().runtime(device, dtype, mesh),
            step_checkpoint_every=self.step_checkpoint_every,
            step_checkpoint_seconds=self.step_checkpoint_seconds,
            approximation=self.approximation,
            step_memory_bytes=self.step_memory_bytes,
        )


def device_of(name: str) -> torch.device:
    """The device of a setting, on CUDA with its number. Raises FailedPrecondition when this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", field="device") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", field="device")
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise FailedPrecondition(f"device {name} is not here: this machine has {count} CUDA devices", field="device")
    return torch.device("cuda", index)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The element type of a setting on a device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def prepare_thread(device: torch.device, threads: int) -> None:
    """Make the thread that computes this device's."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def prepare_session_thread(device: torch.device, threads: int) -> None:
    """Make a thread that of a session, which computes now and then beside the thread of this device.

    On a GPU its kernels go before those of the other threads of this process: an item that is decoded late is shown
    late, and the loop that makes the next items is ahead of it.
    """
    prepare_thread(device, threads)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))  # type: ignore[no-untyped-call]
