"""Our cuBLASLt GEMM against nvmath.linalg.advanced, and our float8 linear against torchao, on one GPU.

Every method runs eagerly and in a CUDA graph, for GEMM shapes of the DiTs. `error` is the larger relative L2 error of
both runs against float32. `host us` is the time in which Python enqueues a call; `graph us` is the GPU time of a call
in a graph. Both are medians of several rounds; GPU rounds alternate between the methods, so that all run at the same
clock rate. Ratios are ours / theirs: above 1, theirs is faster. A method that fails is shown as "-", with its error
below the table.

Matmul objects are planned once per shape. Each call sets its operands by reset_operands_unchecked(), or by
reset_operands() if the method is named "checked". Matmul objects and our GEMM have no workspace, except those
named "workspace", which have the library's default.

Run it with: python tests/bench/gemm_packages.py; it needs nvmath-python with cuda-core, and torchao
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from bench_gemm import (
    COMPILED_SHAPES,
    FLOAT8_SHAPES,
    GEMM_SHAPES,
    ON_GPU,
    SETS,
    Call,
    Operands,
    Prepare,
    Shape,
    float8_methods,
    gemm_methods,
    our_gemm,
    planned_matmul,
)
from bench_report import print_machine, print_table, say
from torch import Tensor

from models.kernels.packages import KernelChoice
from models.kernels.trials import try_packages

PACKAGES = ("nvmath-python", "cuda-core", "cuda-bindings", "torchao", "triton")

WARM_UP_SECONDS = 1.5

HOST_CALLS = 12
"""Calls per round of host timing; few enough that the launch queue does not fill up."""

HOST_ROUNDS = 3

GRAPH_ROUNDS = 21


@dataclass
class Figures:
    """Measurements of a method on a shape; NaN if it failed. `same` is whether the bytes equal ours."""

    method: str
    error: float = float("nan")
    same: bool | None = None
    host: float = float("nan")
    graph: float = float("nan")
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Record a failure of the step instead of raising it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (third-party code: a failure must not end the run)
            self.failures.append(f"{name}: {_causes(error)}")


def _causes(error: BaseException) -> str:
    """Format the error and its chained causes, as a failed capture hides its cause."""
    texts = []
    pending: BaseException | None = error
    while pending is not None:
        text = " ".join(str(pending).split()) or "no message"
        texts.append(f"{type(pending).__name__}: {textwrap.shorten(text, 240, placeholder=' ...')}")
        pending = pending.__cause__ or pending.__context__
    return " | after ".join(texts[:3])


class CapturedCalls:
    """Calls within one CUDA graph, the last of them on the first set. Raises the errors of capturing.

    It holds a reference to `call`, because the graph reads its weights and launches its compiled kernels.
    """

    def __init__(self, call: Call, calls: int, *, warm_up: bool = True) -> None:
        self._call = call
        home = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(home)
        try:
            if warm_up:
                with torch.cuda.stream(stream):
                    for index in range(SETS):
                        call(index)
                stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                for index in reversed(range(calls)):
                    self.result = call(index % SETS)
        finally:
            # A failed capture does not restore the current stream.
            torch.cuda.set_stream(home)

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


def host_microseconds(call: Call) -> float:
    """Median host time of a call in us."""
    spent = []
    for _ in range(HOST_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for index in range(HOST_CALLS):
            call(index % SETS)
        spent.append((time.perf_counter() - began) / HOST_CALLS)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(spent)


def graph_microseconds(graphs: Sequence[CapturedCalls], calls: int) -> list[float]:
    """Median GPU time in us of a call in each graph; the graphs alternate."""
    events = [[(_event(), _event()) for _ in graphs] for _ in range(GRAPH_ROUNDS)]
    for pairs in events:
        for graph, (begin, end) in zip(graphs, pairs, strict=True):
            begin.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    rounds = [[1e3 * begin.elapsed_time(end) / calls for begin, end in pairs] for pairs in events]
    return [statistics.median(spent) for spent in zip(*rounds, strict=True)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure(shape: Shape, methods: Mapping[str, Prepare]) -> list[Figures]:
    """Measure every method on a shape."""
    operands = Operands(shape)
    exact = operands.exact()
    found, first = [], None
    captured: list[tuple[Figures, CapturedCalls]] = []
    stacks = []
    for name, prepare in methods.items():
        figures, stack = Figures(name), ExitStack()
        found.append(figures)
        stacks.append(stack)
        with figures.step("eager"):
            call = prepare(operands, stack)
            operands.out.zero_()
            result = call(0).clone()
            figures.error = operands.error(result, exact)
            first = result if name == "ours" else first
            figures.same = None if first is None else torch.equal(result, first)
            figures.host = host_microseconds(call)
        if figures.failures:
            continue
        with figures.step("graph"):
            graph = CapturedCalls(call, shape.calls)
            operands.out.zero_()
            graph.replay()
            figures.error = max(figures.error, operands.error(graph.result, exact))
            captured.append((figures, graph))
    _time_graphs(captured, shape.calls)
    for figures, stack in zip(found, stacks, strict=True):
        with figures.step("free"):
            stack.close()
    return found


def _time_graphs(captured: Sequence[tuple[Figures, CapturedCalls]], calls: int) -> None:
    """Set the GPU times. All graphs are synchronized together, so a failure is recorded for every graph."""
    timing = Figures("timing")
    with timing.step("timing of graphs"):
        spent = graph_microseconds([graph for _, graph in captured], calls)
        for (figures, _), each in zip(captured, spent, strict=True):
            figures.graph = each
    for figures, _ in captured:
        figures.failures += timing.failures


def measure_all(shapes: Sequence[Shape], methods: Callable[[Shape], Mapping[str, Prepare]], until: float) -> None:
    """Measure shapes until the monotonic time `until`, and print their table, failures and ratios."""
    rows: list[tuple[object, ...]] = []
    failures: dict[str, list[str]] = {}
    ratios: dict[str, list[tuple[float, float]]] = {}
    for shape in shapes:
        if time.monotonic() > until:
            failures.setdefault("not measured before the time limit", []).append(shape.title)
            continue
        case = Figures(shape.title)
        with case.step("shape"):
            found = measure(shape, methods(shape))
            ours = found[0]
            for each in found:
                ratio = (ours.host / each.host, ours.graph / each.graph)
                same = "-" if each.same is None else "yes" if each.same else "no"
                times = (_text(each.host, ".1f"), _text(each.graph, ".1f"), *(_text(value, ".3f") for value in ratio))
                rows.append((shape.title if each is ours else "", each.method, _text(each.error, ".2e"), same, *times))
                if each is not ours:
                    ratios.setdefault(each.method, []).append(ratio)
                for failure in each.failures:
                    failures.setdefault(f"{each.method}, {failure}", []).append(shape.title)
        for failure in case.failures:
            failures.setdefault(failure, []).append(shape.title)
        gc.collect()
        torch.cuda.empty_cache()
    header = ("GEMM", "method", "error", "equals ours", "host us", "graph us", "host, ratio", "graph, ratio")
    print_table(header, rows)
    for failure, titles in failures.items():
        say(f"failed: {failure}")
        say(f"    for {'; '.join(titles)}")
    for method, pairs in ratios.items():
        host, graph = (_spread(values) for values in zip(*pairs, strict=True))
        say(f"ours / {method}: host {host}; graph {graph}")
    say()


def _text(value: float, form: str) -> str:
    """Format a number; NaN becomes "-"."""
    return f"{value:{form}}" if value == value else "-"


def _spread(values: Sequence[float]) -> str:
    """Format median, minimum and maximum of the measured values."""
    known = [value for value in values if value == value]
    return f"{statistics.median(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


def try_planning_within_capture() -> None:
    """Print whether the first call of a shape can be captured, where planning must not synchronize.

    It runs last, as a failed capture may make PyTorch unusable for further captures.
    """
    operands = Operands(Shape("", 1040, 3072, 3072))
    exact = operands.exact()
    for name, prepare in (("ours", our_gemm), ("Matmul", planned_matmul())):
        figures, stack = Figures(name), ExitStack()
        with figures.step("capture"):
            call = _planned_at_first(prepare, operands, stack)
            operands.out.zero_()
            graph = CapturedCalls(call, SETS, warm_up=False)
            graph.replay()
            figures.error = operands.error(graph.result, exact)
        with figures.step("free"):
            stack.close()
        say(f"first call within a capture, {name}: {'; '.join(figures.failures) or f'error {figures.error:.2e}'}")


def _planned_at_first(prepare: Prepare, operands: Operands, stack: ExitStack) -> Call:
    """A call that prepares its method at its first run."""
    prepared: list[Call] = []

    def call(index: int) -> Tensor:
        if not prepared:
            prepared.append(prepare(operands, stack))
        return prepared[0](index)

    return call


@torch.no_grad()
def main() -> None:
    """Measure all tables and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0, help="time after which no further shape is started")
    parser.add_argument("--only", choices=("gemm", "float8"), help="measure only one of the two parts")
    args = parser.parse_args()
    began = time.monotonic()
    print_machine("GEMM and float8 linear layers, ours against packages")
    say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {', '.join(map(_version, PACKAGES))}")
    say()
    # Our float8 activations are quantized by Triton. linear_into() imports nvmath.bindings without a trial.
    try_packages(torch.device("cuda", torch.cuda.current_device()), KernelChoice(("triton",)))
    warm_up()
    if args.only != "float8":
        say("## cuBLASLt: ours against nvmath.linalg.advanced.Matmul")
        say()
        measure_all(GEMM_SHAPES, gemm_methods, began + args.seconds / 2)
    if args.only != "gemm":
        say("## float8: ours against torchao")
        say()
        measure_all(FLOAT8_SHAPES, float8_methods, began + args.seconds)
        say("## float8: ours against torchao with torch.compile()")
        say()
        measure_all(COMPILED_SHAPES, float8_methods, began + args.seconds)
    if args.only != "float8":
        try_planning_within_capture()
    say(f"{time.monotonic() - began:.0f} s")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} absent"


def warm_up() -> None:
    """Keep the GPU busy until its clock rate is stable."""
    x = torch.randn(8192, 8192, generator=torch.Generator("cuda").manual_seed(0), **ON_GPU)
    until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        for _ in range(10):
            x @ x
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
