"""Settings classes of the stage services, and the device and dtype that they select.

Each service has only the settings that it reads. SETTINGS in its module (see services.cli.serve) names its class.

    WorkerSettings      all stage services; latent_preparation has no further settings
    CachingSettings     reply caches: text_encoding
    KernelSettings      optional kernel packages on a GPU: image_encoding, decoding, denoising
    StepSettings        stages that report steps: before_denoising, decoding, denoising
    WarmUpSettings      StepSettings and warm-up requests: before_denoising, denoising
    DecodingSettings    KernelSettings and StepSettings
    LoopSettings        denoising loops; DenoisingSettings in services.denoising.settings adds the worker group
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
        DEFAULT_MODEL, help="model to serve: a Diffusers directory, NAME=DIR, or the name of a shipped model"
    )
    redis: str = setting(help="URL of the request store, in which the worker is announced")
    listen: str = setting("127.0.0.1:0", help="address to listen on: HOST:PORT (port 0: any free port), or unix:PATH")
    advertise: str = setting("", help="address for coordinators, if it is not --listen")
    device: str = setting("auto", help="device of the computation: auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", help="dtype of the computation; auto: bfloat16 on CUDA, float32 elsewhere"
    )
    threads: int = setting(0, help="CPU threads per operation; 0: torch's default")
    capacity: int = setting(1, help="concurrent requests; the device computes one request at a time")
    plugins: tuple[Path, ...] = setting((), help="directory with model families from outside this tree; repeatable")
    grace_seconds: float = setting(
        30.0, help="seconds for running calls to finish, or to be handed over, after SIGTERM"
    )
    announce_seconds: float = setting(60.0, help="seconds to wait for the request store at the start")
    idle_seconds: float = setting(30.0, help="seconds without a message after which an incomplete call is ended")
    max_call_bytes: int = setting(2 << 30, help="maximum bytes of the tensors of one header or stream item of a call")
    tls_callers: tuple[str, ...] = setting(("coordinator",), help="names of accepted client certificates; repeatable")
    metrics_port: int | None = setting(None, help="port for Prometheus metrics; unset: no metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting("INFO", help="minimum level of log lines")
    log_format: Literal["text", "json"] = setting(
        "text", help="format of log lines: text, or json with one object per line"
    )

    def concurrency(self, contract: Contract) -> int:
        """Concurrent requests of stages with this contract."""
        del contract
        return self.capacity

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The runtime of the service's stages: device, dtype and mesh."""
        return Runtime(device=device, dtype=dtype, mesh=mesh)

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages; None for a service without such packages.

        Raises InvalidInput for contradictory settings.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class CachingSettings(WorkerSettings):
    """Serve a stage with cached replies, such as text encoding."""

    reply_cache_bytes: int = setting(256 << 20, help="memory of the reply cache, in bytes; 0: no cache")
    reply_cache_redis_bytes: int = setting(
        0, help="memory of the reply cache in Redis, shared with other workers, in bytes; 0: no cache"
    )
    reply_cache_redis_seconds: float = setting(
        3_600.0, help="seconds from the last use of a shared reply until it expires"
    )
    reply_cache_redis_gain: float = setting(
        2.0, help="minimum ratio of compute time to fetch time for a reply to be shared; 0: share all replies"
    )


@dataclass(frozen=True, kw_only=True)
class KernelSettings(WorkerSettings):
    """Serve a stage with optional kernel packages on a GPU, such as image encoding."""

    kernels: tuple[PackageChoice, ...] = setting(
        ("auto",),
        help="kernel packages on a GPU; auto: all that work; a named package must work; none: no package; repeatable",
    )
    kernel_cache: Path | None = setting(None, help="directory that caches compiled kernels across restarts")

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages. Raises InvalidInput for contradictory settings."""
        return KernelChoice(self.kernels)


@dataclass(frozen=True, kw_only=True)
class StepSettings(WorkerSettings):
    """Serve a stage that reports steps."""

    hang_seconds: float = setting(60.0, help="seconds without a step, after the first one, until a call is cancelled")
    hang_mean_steps: float = setting(20.0, help="hang_seconds is at least this many mean step times of the call")
    hang_exit_seconds: float = setting(
        30.0, help="seconds from the cancellation of a hung call to the end of the process"
    )
    step_seconds: float = setting(0.25, help="minimum seconds between two reported steps of a call")

    @property
    def hang_limits(self) -> HangLimits:
        """Bounds beyond which a call counts as hung. Raises InvalidInput for a bound that is not more than 0."""
        return HangLimits(
            seconds=self.hang_seconds, mean_steps=self.hang_mean_steps, exit_seconds=self.hang_exit_seconds
        )


@dataclass(frozen=True, kw_only=True)
class WarmUpSettings(StepSettings):
    """Serve a stage that can run warm-up requests at the start, such as before_denoising."""

    warm_up: tuple[str, ...] = setting(
        (),
        help="size of a warm-up request: HEIGHTxWIDTH[xFRAMES][@VARIANT]; without @VARIANT: all variants; repeatable",
    )


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(KernelSettings, StepSettings):
    """Serve the decoding of one model."""

    sessions: int = setting(4, help="concurrent videos of a model that streams latents, instead of capacity")

    def concurrency(self, contract: Contract) -> int:
        """`sessions` for stages that read streams, whose sessions mostly wait for items; else `capacity`."""
        return self.sessions if contract.input_streams else self.capacity


@dataclass(frozen=True, kw_only=True)
class LoopSettings(KernelSettings, StepSettings):
    """Serve a denoising loop."""

    attention_backend: AttentionChoice = setting(
        "auto", help="attention backend on a GPU; auto: by the GPU and the shape; a named backend must work"
    )
    step_checkpoint_every: int = setting(0, help="denoising steps between two step checkpoints; 0: by time only")
    step_checkpoint_seconds: float = setting(5.0, help="maximum seconds between two step checkpoints; 0: by steps only")
    step_memory_bytes: int = setting(
        DEFAULT_STEP_MEMORY_BYTES,
        help="maximum memory of CUDA graphs, their inputs, and buffers that steps update in place, in bytes",
    )

    @property
    def approximation(self) -> Approximation:
        """The approximations that the loop may use."""
        return EXACT

    @property
    def kernel_choice(self) -> KernelChoice | None:
        """Optional kernel packages and attention backend. Raises InvalidInput for contradictory settings."""
        return KernelChoice(self.kernels, self.attention_backend)

    def runtime(self, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None) -> Runtime:
        """The runtime of the loop: device, dtype, mesh and the settings that stages read."""
        return replace(
            super().runtime(device, dtype, mesh),
            step_checkpoint_every=self.step_checkpoint_every,
            step_checkpoint_seconds=self.step_checkpoint_seconds,
            approximation=self.approximation,
            step_memory_bytes=self.step_memory_bytes,
        )


def device_of(name: str) -> torch.device:
    """The device of the setting `device`, with the index of a CUDA device.

    Raises InvalidInput for an unknown name, FailedPrecondition for a device that this host lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"device: {name!r} is not auto, cpu, cuda or cuda:N; auto works", field="device") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device: {name!r} is not auto, cpu, cuda or cuda:N; auto works", field="device")
    if device.type == "cpu":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise FailedPrecondition(f"device: {name} is not available: this host has {count} CUDA devices", field="device")
    return torch.device("cuda", index)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the setting `dtype` on this device."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def prepare_thread(device: torch.device, threads: int) -> None:
    """Prepare a thread to compute on this device."""
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def prepare_session_thread(device: torch.device, threads: int) -> None:
    """Prepare the thread of a session, which computes concurrently with the device's thread.

    On a GPU, its CUDA stream has a higher priority than the streams of other threads, because a delayed item is
    displayed late, whereas the denoising loop (with `fleet generate`, in the same process) computes later items.
    """
    prepare_thread(device, threads)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=-1))  # type: ignore[no-untyped-call]
