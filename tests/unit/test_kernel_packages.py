"""Optional kernel packages: trials at the start of a GPU worker, replacements, and refused settings."""

from __future__ import annotations

import importlib
import socket
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor

from common.errors import FailedPrecondition, FleetError, InvalidInput
from fake_kernel_packages import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, LAUNCH_FAILS, WRONG_RESULTS, install
from kernel_modules import fresh_imports
from models import kernels
from models.kernels import cublas_lt, quack_gemm, trials
from models.kernels.backends import BACKENDS, Operation, facts
from models.kernels.packages import PACKAGES, Capability, KernelChoice, PackageName, TrialOutcome, is_usable, record
from models.kernels.trials import outcomes_on, try_package, try_packages
from models.loader import numerics_fingerprint
from models.parallel import mesh
from services import worker
from services.denoising import rank
from services.denoising.__main__ import main as denoising
from services.denoising.facts import compare_facts
from services.denoising.messages import Link
from services.denoising.rank import FollowingRank, LeadingRank
from services.worker_server import kernel_messages
from services.worker_settings import DecodingSettings

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
BY_NAME = {package.name: package for package in PACKAGES}
FLASH_ATTN = BY_NAME["flash-attn"]

BROKEN = {
    "import": ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol"),
    "library": ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12"),
    "launch": (LAUNCH_FAILS, "RuntimeError: CUDA error: no kernel image"),
    "signature": ("def flash_attn_func(q, k): return q", "TypeError: flash_attn_func() takes 2"),
    "result": (WRONG_RESULTS, "ArithmeticError: wrong result: error"),
}

Install = Callable[[str], None]


@pytest.fixture
def flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function that installs flash-attn 2 with the given source."""
    monkeypatch.syspath_prepend(tmp_path)
    with fresh_imports("flash_attn"):
        yield lambda source: install(tmp_path, "flash-attn", "2.8.3", "flash_attn", source)


def attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict trials to attention packages; other packages may be installed and fail without a GPU."""
    packages = tuple(each for each in PACKAGES if each.module.startswith(("fa3", "flash")))
    monkeypatch.setattr(trials, "PACKAGES", packages)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_named_with_its_replacement(
    flash_attn: Install, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    source, expected = BROKEN[kind]
    flash_attn(source)
    outcome = try_package(FLASH_ATTN, CPU)
    assert outcome is not None
    assert expected in outcome.error
    (line,) = caplog.messages
    assert line.startswith("kernel package is unusable package=flash-attn version=2.8.3")
    assert 'replacement="cuDNN or PyTorch attention"' in line
    assert expected in line
    record(KernelChoice(), [outcome])
    assert not is_usable("flash-attn")


def test_a_working_package_is_used_without_a_log_line(flash_attn: Install, caplog: pytest.LogCaptureFixture) -> None:
    flash_attn(FLASH_ATTN_2)
    outcome = try_package(FLASH_ATTN, CPU)
    assert outcome == TrialOutcome(FLASH_ATTN, "2.8.3")
    record(KernelChoice(), [outcome])
    assert is_usable("flash-attn")
    assert not is_usable("fa3-fwd")
    assert not caplog.messages


def test_an_absent_package_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert try_package(FLASH_ATTN, CPU) is None
    assert not caplog.messages


def test_flash_attn_4_does_not_count_as_flash_attn_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages install modules below `flash_attn`."""
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "flash-attn-4", "4.0.0b36", "flash_attn.cute", FLASH_ATTN_4)
    with fresh_imports("flash_attn"):
        assert try_package(BY_NAME["flash-attn-4"], CPU) == TrialOutcome(BY_NAME["flash-attn-4"], "4.0.0b36")
        assert try_package(FLASH_ATTN, CPU) is None


def test_triton_passes_its_trial() -> None:
    """Triton kernels run in the interpreter."""
    outcome = try_package(BY_NAME["triton"], CPU)
    assert outcome is not None
    assert not outcome.error


@pytest.mark.parametrize("name", ["quack-kernels", "cuda-bindings"])
def test_gpu_packages_fail_their_trial_without_a_gpu(name: PackageName) -> None:
    outcome = try_package(BY_NAME[name], CPU)
    assert outcome is not None
    assert outcome.error


def test_flash_attn_3_passes_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "fa3-fwd", "0.0.3", "fa3_fwd_interface", FLASH_ATTN_3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132), raising=True
    )
    with fresh_imports("fa3_fwd_interface"):
        attend = importlib.import_module("fa3_fwd_interface").flash_attn_func

        def forward(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, num_splits: int) -> None:
            assert num_splits == 1
            out.copy_(attend(q, k, v))

        monkeypatch.setattr(torch.ops, "fa3_fwd", SimpleNamespace(fwd=forward), raising=False)
        outcome = try_package(BY_NAME["fa3-fwd"], CPU)
        assert outcome is not None
        assert not outcome.error


def test_a_trial_that_breaks_the_device_raises(flash_attn: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    flash_attn(LAUNCH_FAILS)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(FailedPrecondition, match="kernels: flash-attn left cpu unusable; uninstall it"):
        try_package(FLASH_ATTN, CPU)


@pytest.mark.parametrize(
    ("capability", "choice", "tried"),
    [
        (HOPPER, KernelChoice(), ["triton", "nvmath-python", "quack-kernels", "cuda-bindings", "fa3-fwd"]),
        (AMPERE, KernelChoice(), ["triton", "nvmath-python", "cuda-bindings", "flash-attn"]),
        (BLACKWELL, KernelChoice(), ["triton", "nvmath-python", "cuda-bindings", "flash-attn-4"]),
        (HOPPER, KernelChoice(("none",)), []),
        (HOPPER, KernelChoice(("none",), "flash_attn_4"), ["flash-attn-4"]),
        (HOPPER, KernelChoice(("quack-kernels",)), ["quack-kernels"]),
        (AMPERE, KernelChoice(attention="sdpa"), ["triton", "nvmath-python", "cuda-bindings"]),
        (HOPPER, KernelChoice(("auto", "flash-attn")), ["triton", "nvmath-python", "quack-kernels", "cuda-bindings",
                                                        "fa3-fwd", "flash-attn"]),
    ],
)  # fmt: skip
def test_tried_packages_depend_on_gpu_and_choice(
    monkeypatch: pytest.MonkeyPatch, capability: Capability, choice: KernelChoice, tried: list[str]
) -> None:
    monkeypatch.setattr(trials, "try_package", lambda package, _: TrialOutcome(package, "1"))
    assert [each.package.name for each in outcomes_on(CPU, capability, choice)] == tried


@pytest.mark.parametrize(
    ("source", "capability", "choice", "message"),
    [
        (
            LAUNCH_FAILS,
            AMPERE,
            KernelChoice(("flash-attn",)),
            "kernels: flash-attn is not usable: .* 2.8.3 is broken: RuntimeError",
        ),
        (
            LAUNCH_FAILS,
            AMPERE,
            KernelChoice(attention="flash_attn_2"),
            "attention_backend: flash_attn_2 is not usable: .* RuntimeErr",
        ),
        (
            "",
            HOPPER,
            KernelChoice(("auto", "fa3-fwd")),
            "kernels: fa3-fwd is not usable: fa3-fwd is not installed; install",
        ),
        ("", AMPERE, KernelChoice(attention="flash_attn_3"), "flash_attn_3 is not for compute capability 8.0; .* 9.0"),
    ],
)
def test_a_named_package_must_work(
    flash_attn: Install,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    capability: Capability,
    choice: KernelChoice,
    message: str,
) -> None:
    attention_only(monkeypatch)
    flash_attn(source)
    with pytest.raises(FailedPrecondition, match=message):
        outcomes_on(CPU, capability, choice)


def test_contradictory_choices_are_refused() -> None:
    with pytest.raises(InvalidInput, match="kernels: none,triton is not one choice"):
        KernelChoice(("none", "triton"))


FLAGS = ("--model", "emoji", "--redis", "unix:///x", "--device", "cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kernels", "flash-attn"), "kernels: flash-attn needs a GPU, and the device is cpu"),
        (("--attention-backend", "cudnn"), "attention_backend: cudnn needs a GPU, and the device is cpu"),
        (("--kernels", "none", "--kernels", "triton"), "kernels: none,triton is not one choice"),
        (("--kernels", "cutlass"), "--kernels: 'cutlass' is not one of auto, none, triton,"),
    ],
)
def test_an_invalid_setting_exits_2(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert denoising([*FLAGS, *flags]) == 2
    assert f"fleet serve denoising: {message}" in capsys.readouterr().err


def test_a_named_broken_package_ends_the_service_with_exit_code_2(
    flash_attn: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention_only(monkeypatch)
    flash_attn(BROKEN["library"][0])
    monkeypatch.setattr(worker, "try_packages", lambda device, choice: outcomes_on(device, AMPERE, choice))
    assert denoising([*FLAGS, "--attention-backend", "flash_attn_2"]) == 2
    assert "2.8.3 is broken: OSError: libcudart.so.12" in capsys.readouterr().err


def test_no_package_is_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "try_package", lambda *_: pytest.fail("a package was tried"))
    with fresh_imports():
        try_packages(CPU)
        with pytest.raises(RuntimeError, match="have not been tried; call models"):
            is_usable("triton")


def test_packages_are_tried_once_per_gpu_and_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[KernelChoice] = []
    monkeypatch.setattr(trials._Latest, "key", None)

    def outcomes(_: object, __: object, choice: KernelChoice) -> tuple[TrialOutcome, ...]:
        tried.append(choice)
        return ()

    monkeypatch.setattr(trials, "outcomes_on", outcomes)
    monkeypatch.setattr(torch.cuda, "device", lambda _: threading.Lock())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: HOPPER)
    none = KernelChoice(("none",))
    with fresh_imports():
        for choice in (None, None, none, none):
            try_packages(torch.device("cuda", 0), choice)
        assert tried == [KernelChoice(), none]
        assert not is_usable("triton")


def fingerprint(*, uses_kernels: bool = True) -> str:
    return numerics_fingerprint(torch.device("cuda", 0), torch.bfloat16, uses_kernels=uses_kernels)


def test_outcomes_are_part_of_the_numerics_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    quack = BY_NAME["quack-kernels"]
    with fresh_imports():
        found = []
        for choice, outcomes in (
            (KernelChoice(), []),
            (KernelChoice(attention="cudnn"), []),
            (KernelChoice(), [TrialOutcome(quack, "0.6.5")]),
            (KernelChoice(), [TrialOutcome(quack, "0.6.6")]),
            (KernelChoice(), [TrialOutcome(quack, "0.6.5", "ImportError: a")]),
        ):
            record(choice, outcomes)
            found.append(fingerprint())
        assert len(set(found)) == len(found)
        record(KernelChoice(), [TrialOutcome(quack, "0.6.5", "ImportError: at 0x7f")])
        assert fingerprint() == found[-1], "the text of an error may differ between processes"
        record(KernelChoice(), None)
        with pytest.raises(RuntimeError, match="have not been tried"):
            fingerprint()
        alone = fingerprint(uses_kernels=False)
        record(KernelChoice(), [TrialOutcome(quack, "0.6.5")])
        assert fingerprint(uses_kernels=False) == alone, "a service without kernels must not depend on packages"


def test_kernel_messages_have_version_error_and_replacement() -> None:
    triton, quack = kernel_messages(
        [TrialOutcome(BY_NAME["triton"], "3.6.0"), TrialOutcome(BY_NAME["quack-kernels"], "1", "E")]
    )
    assert (triton.name, triton.version, triton.error, triton.replacement) == ("triton", "3.6.0", "", "")
    assert (quack.error, quack.replacement) == ("E", "cuBLASLt or PyTorch GEMM and separate passes")


def test_layers_do_not_call_unusable_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = cast(Tensor, SimpleNamespace(is_cuda=True))
    operation: Operation[Callable[[Tensor], str]] = Operation("gelu")

    @operation.register("triton")
    def by_triton(_: Tensor) -> str:
        return "triton"

    operation.register("torch")(lambda _: "torch")
    for module in (cublas_lt, quack_gemm):
        monkeypatch.setattr(module, "can_load", lambda *_: True)
    monkeypatch.setattr(cublas_lt, "_ASSUMED_ALIGNMENT", 1)
    monkeypatch.setattr(quack_gemm, "_capability", lambda _: HOPPER)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    x = torch.zeros(2048, 16)

    def uses() -> list[bool]:
        return [
            operation.for_device_of(on_gpu) is by_triton,
            cublas_lt.can_multiply(x, x),
            quack_gemm.can_fuse(x, x, x),
            mesh._have_peer_access(torch.device("cuda", 0), 2),
        ]

    names: tuple[PackageName, ...] = ("triton", "nvmath-python", "quack-kernels", "cuda-bindings")
    with fresh_imports():
        record(KernelChoice(), [TrialOutcome(BY_NAME[name], "1") for name in names])
        assert uses() == [True] * 4
        for name in names:
            record(KernelChoice(), [TrialOutcome(BY_NAME[each], "1", "E" if each == name else "") for each in names])
            assert uses() == [each != name for each in names]


def test_ranks_with_different_facts_raise() -> None:
    """Both ranks raise an error that names the difference."""
    left, right = map(Link, (1, 0), socket.socketpair())
    found: list[FleetError] = []

    def follow() -> None:
        try:
            compare_facts([right], ["triton 3.6.0 in use", "quack-kernels 0.6.5 unusable"], 5.0)
        except FleetError as error:
            found.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    message = "rank 1 has quack-kernels 0.6.5 unusable and this rank has quack-kernels 0.6.5 in use; use the same GPUs"
    with pytest.raises(FailedPrecondition, match=message):
        compare_facts([left], ["triton 3.6.0 in use", "quack-kernels 0.6.5 in use"], 5.0)
    thread.join(5)
    assert "rank 0 has quack-kernels 0.6.5 in use" in found[0].message
    left.close()
    right.close()


def test_a_rank_compares_facts_before_it_creates_its_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    leading_link, following_link = map(Link, (1, 0), socket.socketpair())
    monkeypatch.setattr(rank, "facts_of", lambda *_: ["a"])

    def follow() -> None:
        with suppress(FailedPrecondition):
            compare_facts([following_link], ["b"], 5.0)

    thread = threading.Thread(target=follow)
    thread.start()
    settings = SimpleNamespace(degrees=None, ranks_per_node=2, rank_join_seconds=5.0)
    leading = LeadingRank(cast(Any, None), cast(Any, None), cast(Any, settings), [leading_link], cast(Any, None))
    with pytest.raises(FailedPrecondition, match="rank 1 has b and this rank has a"):
        leading.make_mesh(CPU)
    thread.join(5)
    leading_link.close()
    following_link.close()


def test_a_follower_tries_its_packages_before_it_loads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(device: torch.device, choice: KernelChoice) -> None:
        raise InvalidInput(f"{device} {choice.packages}")

    monkeypatch.setattr(rank, "try_packages", tried)
    choice = KernelChoice(("triton",))
    settings = SimpleNamespace(degrees=None, ranks_per_node=2, device="cpu", threads=0, kernel_choice=choice)
    liveness = SimpleNamespace(start=lambda **_: None)
    place = cast(Any, SimpleNamespace(local_rank=1))
    follower = FollowingRank(place, cast(Any, None), cast(Any, settings), [], cast(Any, liveness))
    with pytest.raises(InvalidInput, match="triton"):
        follower.run(cast(Any, None))


def test_contradictory_kernels_are_refused_before_the_service_starts(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*_: object) -> int:
        raise AssertionError("the service was started")

    flags = [*FLAGS, "--kernels", "none", "--kernels", "auto"]
    assert worker.run_service("decoding", DecodingSettings, run, flags) == 2
    assert "none,auto is not one choice" in capsys.readouterr().err


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Requirements of all extras, each with the name of its extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in map(Requirement, requirements):
            yield extra, requirement


def test_every_kernel_package_is_declared_with_an_upper_bound() -> None:
    declared = [(extra, each) for extra, each in _requirements() if each.name in BY_NAME]
    assert {each.name for extra, each in declared if extra != "test"} == set(BY_NAME)
    assert {extra for extra, each in declared if each.name == "flash-attn"} == {"flash-attn"}
    unbounded = [str(each) for _, each in declared if not {"<", "==", "~="} & {one.operator for one in each.specifier}]
    assert not unbounded


def test_every_package_of_the_gpu_extras_is_tried() -> None:
    assert {each.name for extra, each in _requirements() if extra in ("gpu", "flash-attn")} == set(BY_NAME)
    assert set(trials._TRIALS) == set(BY_NAME)


def test_facts_list_all_backends_of_all_operations() -> None:
    with fresh_imports():
        record(KernelChoice(), [TrialOutcome(package, "1") for package in PACKAGES])
        lines = facts()
        for operation, backends in BACKENDS.items():
            assert f"{operation}: {' '.join(backends)}" in lines
        record(KernelChoice(), [TrialOutcome(BY_NAME["triton"], "1", "E")])
        assert "gelu: torch" in facts()


def test_an_unknown_backend_cannot_be_registered() -> None:
    operation: Operation[Callable[[], None]] = Operation("gemm")
    with pytest.raises(ValueError, match="gemm: cutlass is not in BACKENDS; add it there, so that facts"):
        operation.register("cutlass")


def test_every_backend_has_an_implementation() -> None:
    """BACKENDS lists only backends that a module registers."""
    folder = Path(kernels.__file__).parent
    optional = {"triton_kernels", "quack_epilogues"}  # these modules import GPU packages
    found: dict[str, frozenset[str]] = {}
    for file in sorted(folder.glob("[a-z]*.py")):
        if file.stem in optional:
            continue
        module = importlib.import_module(f"models.kernels.{file.stem}")
        found |= {each.name: each.registered() for each in vars(module).values() if isinstance(each, Operation)}
    assert found == {name: frozenset(backends) for name, backends in BACKENDS.items()}
