"""Plan of a chaos run, drawn from a seed: the clients' requests, and the faults with their positions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from fleet.v1 import generation_pb2 as pb

FLUX, WAN, CAUSAL = "flux", "wan", "causal"
STEPS = 12

_FLUX_GIVEN = {"height": 192, "width": 192, "num_inference_steps": STEPS}
_LARGE_GIVEN = {"height": 384, "width": 384, "num_inference_steps": STEPS}  # a loop of about a second
_WAN_GIVEN = {"height": 48, "width": 64, "num_frames": 5, "num_inference_steps": STEPS}
# A streamed video of three blocks with four steps each.
_CAUSAL_GIVEN = {"height": 64, "width": 96, "num_frames": 21}
_SHARES: Mapping[str, float] = MappingProxyType({FLUX: 0.6, WAN: 0.2, CAUSAL: 0.2})
_FAR_DEADLINE_SECONDS = 1_800.0
_VARIANTS = 4
CALLERS = ("studio", "press")
_PROMPTS = ("a red apple", "a blue car", "the old stone on the moon", "a cat on the river")


class Behavior(Enum):
    """How a client sends its request."""

    SUBMIT = "submits without an idempotency key"
    KEYED = "submits with an idempotency key"
    TWICE = "submits with one idempotency key to several coordinators at once, and again after the end"
    GENERATE = "generates with an idempotency key"
    CANCEL = "submits with an idempotency key, and cancels during denoising"
    LEAVE = "generates without an idempotency key, and disconnects during denoising"
    HURRY = "submits with an idempotency key and a deadline that may pass"
    POISON = "submits with an idempotency key; each worker that denoises the request is killed"


_BEHAVIORS: Mapping[Behavior, int] = MappingProxyType(
    {
        Behavior.SUBMIT: 5,
        Behavior.KEYED: 7,
        Behavior.TWICE: 3,
        Behavior.GENERATE: 3,
        Behavior.CANCEL: 2,
        Behavior.LEAVE: 1,
        Behavior.HURRY: 2,
    }
)
"""Relative frequency of each behavior."""

INNOCENT = (Behavior.SUBMIT, Behavior.KEYED, Behavior.TWICE, Behavior.GENERATE)
"""Behaviors whose requests must succeed."""


class Kind(Enum):
    """A kind of fault."""

    KILL_DENOISER = "SIGKILL of a busy denoiser"
    KILL_WORKER = "SIGKILL of a worker"
    STOP_WORKER = "SIGSTOP of a worker, then SIGCONT"
    FREEZE_WORKER = "SIGSTOP of a worker, then SIGKILL"
    LEAVE_WORKER = "SIGTERM of a worker"
    KILL_COORDINATOR = "SIGKILL of a coordinator"
    STOP_COORDINATOR = "SIGSTOP of a coordinator, then SIGCONT"
    FREEZE_COORDINATOR = "SIGSTOP of a coordinator, then SIGKILL"
    LEAVE_COORDINATOR = "SIGTERM of a coordinator"
    KILL_BOTH = "SIGKILL of a denoiser and its coordinator"
    RESTART_STORE = "SIGKILL and restart of Redis"
    HOLD_STORE = "partition from Redis, packets late"
    CUT_STORE = "partition from Redis, connections reset"
    HOLD_WORKER = "partition from a worker, packets late"
    CUT_WORKER = "partition from a worker, connections reset"
    SLOW_WATCH = "watcher that does not read"
    SLOW_DOWNLOAD = "download that is not read"
    MALFORMED_COORDINATOR = "malformed peer of a coordinator"
    MALFORMED_WORKER = "malformed peer of a worker"


_FAULTS: Mapping[Kind, int] = MappingProxyType(
    {
        Kind.KILL_DENOISER: 5,
        Kind.KILL_WORKER: 3,
        Kind.STOP_WORKER: 2,
        Kind.FREEZE_WORKER: 1,
        Kind.LEAVE_WORKER: 2,
        Kind.KILL_COORDINATOR: 3,
        Kind.STOP_COORDINATOR: 2,
        Kind.FREEZE_COORDINATOR: 1,
        Kind.LEAVE_COORDINATOR: 1,
        Kind.KILL_BOTH: 2,
        Kind.RESTART_STORE: 2,
        Kind.HOLD_STORE: 3,
        Kind.CUT_STORE: 3,
        Kind.HOLD_WORKER: 2,
        Kind.CUT_WORKER: 2,
        Kind.SLOW_WATCH: 1,
        Kind.SLOW_DOWNLOAD: 1,
        Kind.MALFORMED_COORDINATOR: 2,
        Kind.MALFORMED_WORKER: 2,
    }
)
"""Relative frequency of each kind."""


@dataclass(frozen=True)
class MediaRequest:
    """Model and parameters of a request. Equal requests have byte-equal results."""

    model: str
    prompt: str
    seed: int
    is_large: bool = False

    @property
    def given(self) -> Mapping[str, Any]:
        """The sampling parameters by name."""
        sizes = {FLUX: _LARGE_GIVEN if self.is_large else _FLUX_GIVEN, WAN: _WAN_GIVEN, CAUSAL: _CAUSAL_GIVEN}
        return {"prompt": self.prompt, "seed": self.seed, **sizes[self.model]}

    @property
    def parameters(self) -> pb.GenerationParameters:
        """The sampling parameters as a message."""
        return pb.GenerationParameters(**self.given)


MEDIA_REQUESTS = tuple(
    MediaRequest(model, _PROMPTS[number % len(_PROMPTS)], number) for model in _SHARES for number in range(_VARIANTS)
)
LARGE_REQUESTS = tuple(
    MediaRequest(FLUX, prompt, _VARIANTS + number, is_large=True) for number, prompt in enumerate(_PROMPTS)
)


@dataclass(frozen=True)
class Order:
    """Request, caller and behavior of one client, which cancels or disconnects at step `at_step`."""

    number: int
    caller: str
    media_request: MediaRequest
    behavior: Behavior
    priority: int
    deadline_seconds: float | None
    at_step: int


@dataclass(frozen=True)
class Fault:
    """A fault that is injected after `after_orders` ended orders and then `after_events` further events.

    `seconds` is the duration of lasting faults; `draw` in [0, 1) selects among the possible targets.
    """

    number: int
    kind: Kind
    after_orders: int
    after_events: int
    seconds: float
    draw: float

    def __str__(self) -> str:
        when = f"after {self.after_orders} orders and {self.after_events} events"
        return f"fault {self.number}: {self.kind.value}, {when}, for {self.seconds:.1f} s, draw {self.draw:.3f}"


@dataclass(frozen=True)
class Plan:
    """Plan of a whole run. The run's progress triggers `faults`.

    If `death_seconds` is not 0, each process is also killed every `death_seconds` on average; some are stopped.
    """

    seed: int
    clients: int
    orders: Sequence[Order]
    faults: Sequence[Fault]
    longest_seconds: float
    media_requests: Sequence[MediaRequest] = MEDIA_REQUESTS
    is_churn: bool = False
    death_seconds: float = 0.0

    def skews(self) -> random.Random:
        """A random generator, from which the fleet draws the clock error of each process."""
        return random.Random(f"skews of {self.seed}")


def make_plan(seed: int, requests: int, *, clients: int, faults: int, longest_seconds: float) -> Plan:
    """Draw a plan with at least one fault of each kind; faults last at most `longest_seconds`."""
    rng = random.Random(seed)
    orders = [_order(number, rng) for number in range(requests)]
    kinds = list(Kind) + rng.choices(list(_FAULTS), list(_FAULTS.values()), k=max(0, faults - len(Kind)))
    rng.shuffle(kinds)
    last = max(1, requests - clients)
    drawn = [
        Fault(
            number=number,
            kind=kind,
            after_orders=number * last // len(kinds),
            after_events=rng.randrange(1, 25),
            seconds=rng.uniform(0.2, longest_seconds),
            draw=rng.random(),
        )
        for number, kind in enumerate(kinds)
    ]
    return Plan(seed, clients, orders, drawn, longest_seconds)


def make_churn_plan(
    seed: int, requests: int, *, clients: int, death_seconds: float, longest_seconds: float, poison: int
) -> Plan:
    """Draw a plan of timed kills. `poison` is the number of requests that kill their workers."""
    rng = random.Random(seed)
    poisoned = set(rng.sample(range(requests), poison))
    orders = [
        make_order(number, rng, LARGE_REQUESTS, (Behavior.POISON,) if number in poisoned else INNOCENT)
        for number in range(requests)
    ]
    return Plan(seed, clients, orders, (), longest_seconds, LARGE_REQUESTS, is_churn=True, death_seconds=death_seconds)


def make_order(
    number: int, rng: random.Random, media_requests: Sequence[MediaRequest], behaviors: Sequence[Behavior]
) -> Order:
    """Draw an order without a deadline and without a priority."""
    return Order(
        number=number,
        caller=rng.choice(CALLERS),
        media_request=rng.choice(media_requests),
        behavior=rng.choice(behaviors),
        priority=0,
        deadline_seconds=None,
        at_step=0,
    )


def _order(number: int, rng: random.Random) -> Order:
    (model,) = rng.choices(list(_SHARES), list(_SHARES.values()))
    behavior = rng.choices(list(_BEHAVIORS), list(_BEHAVIORS.values()))[0]
    far = rng.choice((None, None, _FAR_DEADLINE_SECONDS))
    return Order(
        number=number,
        caller=rng.choice(CALLERS),
        media_request=rng.choice([media_request for media_request in MEDIA_REQUESTS if media_request.model == model]),
        behavior=behavior,
        priority=rng.randrange(-2, 3),
        deadline_seconds=rng.uniform(0.5, 3.0) if behavior is Behavior.HURRY else far,
        at_step=rng.randrange(1, STEPS - 2),
    )
