"""Five traces for the simulator, with committed service times; the arrivals depend only on the seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bench_sim_fleet import Arrival, Kind, Trace

from common.scaling import StageWork
from services.cli.stage_seconds import Measurement, Shape, measurements

MINUTE = 60.0
LEAD = 30 * MINUTE  # time before the measured part, at its first rate; excluded from the results
SECONDS = 40 * MINUTE  # measured part
SPREAD = 0.1  # service times vary by up to this fraction, in both directions
SLO_FIXED = 30.0  # fixed part of the SLO latency
SLO_TIMES = 2.0  # the other part of the SLO latency, as a multiple of the computing time
ON_CPU = frozenset({"latent_preparation"})

Rate = Callable[[float], float]


def kind_of(name: str, measured: Measurement, shape: Shape, *, without: frozenset[str] = ON_CPU) -> Kind:
    """Requests of a shape on a measured model; `without` names services that have no GPU or are unused."""
    seconds = {each: measured.seconds_of(each, shape) for each in measured.seconds if each not in without}
    work = {
        each: StageWork(
            steps=shape.steps if measured.proportional[each] == "pixel_step" else 1,
            tokens=1 if measured.proportional[each] == "request" else shape.pixels * shape.branches,
            shape=f"{shape.pixels}",
        )
        for each in seconds
    }
    return Kind(name, work, seconds, SLO_FIXED + SLO_TIMES * sum(seconds.values()))


def _flux(steps: int) -> Kind:
    measured = measurements()["FLUX.1-dev"]
    return kind_of(f"image in {steps} steps", measured, Shape(measured.shape.pixels, steps))


def _wan(latent_frames: int) -> Kind:
    """A Wan 2.2 request without an image, in 50 steps. Work scales with latent frames: a video of 121 frames has 31."""
    measured = measurements()["Wan2.2-TI2V-5B"]
    pixels = measured.shape.pixels * latent_frames // 31
    without = ON_CPU | {"image_encoding"}
    return kind_of(f"{latent_frames} latent frames", measured, Shape(pixels, 50, 2), without=without)


@dataclass(frozen=True)
class Pattern:
    """Requests per second by time; `share` is the fraction of requests of the second kind, by time."""

    rate: Rate
    kinds: tuple[Kind, Kind]
    share: Rate


def _none(_: float) -> float:
    return 0.0


def _between(start: float, end: float, before: float, after: float) -> Rate:
    """`before` until `start`, then linear to `after` at `end`."""

    def value(time: float) -> float:
        return before + (after - before) * min(max((time - start) / (end - start), 0.0), 1.0)

    return value


def _bursts(time: float) -> float:
    return 3.2 if any(start * MINUTE <= time < (start + 3) * MINUTE for start in (8, 25)) else 0.4


def _ramp(time: float) -> float:
    return 4.0 * max(0.0, 1.0 - abs(time / MINUTE - 15) / 15)


def patterns() -> Mapping[str, Pattern]:
    """The patterns of the five traces."""
    flux, long, short = _flux(28), _flux(50), _flux(4)
    image, video = _wan(1), _wan(31)
    shift, mix = (10 * MINUTE, 15 * MINUTE), (10 * MINUTE, 15 * MINUTE)
    return MappingProxyType(
        {
            "step to 4 times": Pattern(lambda time: 0.75 if time < 10 * MINUTE else 3.0, (flux, flux), _none),
            "ramp up and down": Pattern(_ramp, (flux, flux), _none),
            "bursts of 8 times": Pattern(_bursts, (flux, flux), _none),
            "images to videos": Pattern(lambda _: 0.5, (image, video), _between(*mix, 0.02, 0.3)),
            "50 to 4 steps, 3 times": Pattern(_between(*shift, 0.8, 2.4), (long, short), _between(*shift, 0.0, 1.0)),
        }
    )


def draw_trace(name: str, pattern: Pattern, seed: int) -> Trace:
    """Draw Poisson arrivals. Each stage starts with enough replicas for 40% utilization during the lead."""
    rng = random.Random(f"{name} {seed}")
    arrivals, time = [], -LEAD
    most = max(pattern.rate(second) for second in range(int(SECONDS)))
    while (time := time + rng.expovariate(most)) < SECONDS:
        if rng.random() * most < pattern.rate(max(time, 0.0)):  # thinning of the Poisson process
            kind = pattern.kinds[rng.random() < pattern.share(max(time, 0.0))]
            arrivals.append(Arrival(LEAD + time, kind, 1 + rng.uniform(-SPREAD, SPREAD)))
    return Trace(name, arrivals, LEAD + SECONDS, _replicas(pattern), LEAD)


def _replicas(pattern: Pattern) -> dict[str, int]:
    rate, share = pattern.rate(0.0), pattern.share(0.0)
    first, second = (each.seconds for each in pattern.kinds)
    return {name: math.ceil(rate * ((1 - share) * first[name] + share * second[name]) / 0.4) for name in first}
