"""Checks of versions and private APIs of packages at start; errors name the version to install."""

from __future__ import annotations

import abc
import ast
import asyncio
import importlib.metadata
import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from grpc._cython import cygrpc
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch.distributed.elastic.agent.server import api
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler

from async_tests import HANG_SECONDS
from common import package_guard
from common.package_guard import (
    COORDINATOR_PACKAGES,
    SUPPORTED,
    WORKER_PACKAGES,
    Abstract,
    Attributes,
    Called,
    Fact,
    Missing,
    Parameters,
    PrivateApi,
    UnsupportedPackage,
    check_private_api,
    check_versions,
)
from common.rpc import grpcio_patch
from common.rpc.grpcio_patch import GRPCIO, check_server
from models.encoder_runners import prior_tokens
from models.private_operators import COLLECTIVES, GEMM, Operator
from models.schedulers import solver
from services import stage_services, worker
from services.cli import __main__ as cli
from services.coordinator import __main__ as coordinator
from services.denoising import __main__ as denoising
from services.denoising import launcher, meeting
from services.denoising.elastic_api import ELASTIC

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
APIS = [GRPCIO, GEMM, COLLECTIVES, ELASTIC, prior_tokens.PRIVATE_API, *solver.PRIVATE_API.values()]
URL = "redis://user:pass-word-7@nowhere.invalid:6379/0"
WORKER = ["--model", "emoji", "--redis", URL, "--device", "cpu", "--listen", "unix:/nowhere/worker.sock"]


def _versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Make importlib.metadata report these versions; None stands for a package that is not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module `changing`."""
    changing = ModuleType("changing")
    monkeypatch.setitem(sys.modules, "changing", changing)
    return changing


def test_version_ranges_equal_those_of_pyproject() -> None:
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["worker"]]
    declared = {each.name: each.specifier for each in map(Requirement, lines)}
    for name, supported in SUPPORTED.items():
        assert declared[name] == SpecifierSet(supported.versions), name
        assert declared[name].contains(supported.tested), name
    assert declared["grpcio-reflection"] == declared["grpcio-health-checking"] == declared["grpcio"]
    assert set(WORKER_PACKAGES) == set(SUPPORTED)
    base = {each.name for each in map(Requirement, PROJECT["dependencies"])}
    assert set(COORDINATOR_PACKAGES) == base & set(SUPPORTED)


@pytest.mark.parametrize("version", ["2.11", "2.13.0+cpu", "2.13.0a0+git1.nv25", "2.13.99"])
def test_versions_in_range_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, torch=version)
    check_versions("torch")


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "2.14.0a0+git1", "2.14.0.dev20260101", "3.0"])
def test_versions_out_of_range_are_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _versions(monkeypatch, torch=version, diffusers="0.1")
    with pytest.raises(UnsupportedPackage) as caught:
        check_versions(*WORKER_PACKAGES)
    torch, diffusers = caught.value.message.split("; diffusers: ")
    assert torch == f"torch: {version} is not >=2.11,<2.14, the versions that work; pip install 'torch>=2.11,<2.14'"
    assert diffusers.startswith("0.1 is not ==0.42.1")


@pytest.mark.parametrize(("version", "message"), [(None, "not installed"), ("none", "cannot be read")])
def test_a_package_without_a_version_is_named(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _versions(monkeypatch, grpcio=version)
    with pytest.raises(UnsupportedPackage, match=f"grpcio: .*{message}.*pip install 'grpcio>=1.85.1,<2'"):
        check_versions("grpcio")


@pytest.mark.parametrize("private", APIS, ids=lambda each: each.user)
def test_the_installed_packages_have_the_private_api(private: PrivateApi) -> None:
    check_private_api(private)


@pytest.mark.parametrize("private", APIS, ids=lambda each: each.user)
def test_every_fact_is_checked(private: PrivateApi, monkeypatch: pytest.MonkeyPatch) -> None:
    for fact in private.facts:
        path = f"torch:ops.{fact.name}" if isinstance(fact, Operator) else vars(fact)["path"]
        real = package_guard.find

        def find(each: str, missing: str = path, real: Callable[[str], Any] = real) -> Any:
            if each == missing:
                raise Missing(f"{each.replace(':', '.')}, which does not exist")
            return real(each)

        with monkeypatch.context() as patch:
            patch.setattr(package_guard, "find", find)
            patch.setattr("models.private_operators.find", find)
            with pytest.raises(UnsupportedPackage) as caught:
                check_private_api(private)
        supported = SUPPORTED[private.package]
        message = caught.value.message
        assert message.startswith(f"{private.package}: {importlib.metadata.version(private.package)} is not usable: ")
        assert f"{private.user} relies on {path.replace(':', '.')}, which does not exist; " in message
        assert f"versions {supported.versions} " in message
        assert message.endswith(f"pip install '{private.package}=={supported.tested}'")


class _Base(abc.ABC):
    wide = 1

    def __init__(self) -> None:
        self.stored = 1

    @abc.abstractmethod
    def listed(self) -> None: ...


class _Changed(_Base):
    def __init__(self, first: int, *, second: int = 0) -> None:
        super().__init__()
        self.own = first + second

    @property
    def shown(self) -> int:
        return 1

    def method(self, a: int, b: int = 0) -> None: ...


FACTS_THAT_HOLD: list[Fact] = [
    Called("changing:Kind.method", 2),
    Called("changing:Kind.method", 2, ("b",)),
    Called("changing:Kind", 1, ("second",)),
    Parameters("changing:Kind.method", ("self", "a", "b")),
    Parameters("changing:Kind.method", ("self", "a"), ("b", "c")),
    Parameters("changing:Kind.method", ("self", "x|a"), overridden=False),
    Attributes("changing:Kind", ("stored", "own", "wide", "shown", "method")),
    Abstract("changing:Kind", ("listed", "more")),
]
VIOLATED_FACTS: list[tuple[Fact, str]] = [
    (
        Called("changing:Kind.method", 4),
        "changing.Kind.method, which does not accept the arguments (too many positional arguments)",
    ),
    (
        Called("changing:Kind.method", 1),
        "changing.Kind.method, which does not accept the arguments (missing a required argument: 'a')",
    ),
    (Called("changing:Kind", 1, ("third",)), "changing.Kind, which does not accept the arguments"),
    (Called("changing:Kind.gone"), "changing.Kind.gone, which does not exist"),
    (Called("changing.gone:Kind"), "changing.gone.Kind, which does not exist"),
    (Called("changing:number"), "changing.number, which has no signature"),
    (
        Parameters("changing:Kind.method", ("self", "a")),
        "changing.Kind.method, which has other parameters (self, a, b)",
    ),
    (Parameters("changing:Kind.method", ("self", "b", "a")), "changing.Kind.method, which has other parameters"),
    (Parameters("changing:Kind.method", ("self", "a", "b", "c")), "changing.Kind.method, which has other parameters"),
    (Parameters("changing:Kind.method", ("self", "b"), overridden=False), "changing.Kind.method, which has other"),
    (Attributes("changing:Kind", ("stored", "moved")), "changing.Kind.moved, which does not exist"),
    (Abstract("changing:Kind", ("more",)), "changing.Kind, which has the further abstract method listed"),
]


@pytest.mark.parametrize("fact", FACTS_THAT_HOLD)
def test_a_fact_that_holds_passes(fact: Fact, module: ModuleType) -> None:
    vars(module).update(Kind=_Changed, number=3)
    fact.check()


@pytest.mark.parametrize(("fact", "message"), VIOLATED_FACTS)
def test_a_fact_that_does_not_hold_is_an_error(fact: Fact, message: str, module: ModuleType) -> None:
    vars(module).update(Kind=_Changed, number=3)
    with pytest.raises(Missing) as caught:
        fact.check()
    assert str(caught.value).startswith(message)


def test_an_operator_with_the_expected_arguments_passes() -> None:
    Operator("aten._addmm_activation.out", ("self", "mat1"), ()).check()


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [(("mat1", "self"), ()), (("self", "mat2"), ("use_gelu",)), (("self",), ("gone",))],
)
def test_an_operator_with_other_arguments_is_an_error(arguments: tuple[str, ...], keywords: tuple[str, ...]) -> None:
    fact = Operator("aten._addmm_activation.out", arguments, keywords)
    with pytest.raises(Missing, match=r"torch\.ops\.aten\._addmm_activation.out, which has other arguments"):
        fact.check()


def _overridden(cls: type, base: type) -> set[str]:
    """Methods of `cls` that override methods of `base`, a class of a package."""
    return {name for name in vars(cls) if not name.startswith("__") and name in dir(base)} - {"_abc_impl"}


def _checked(private: PrivateApi, cls: str) -> set[str]:
    """Methods of the class `cls` that have a Parameters fact."""
    paths = [each.path for each in private.facts if isinstance(each, Parameters)]
    return {path.rpartition(".")[2] for path in paths if f":{cls}." in path}


def test_every_overridden_method_has_a_fact() -> None:
    assert _overridden(launcher.GroupAgent, LocalElasticAgent) == _checked(ELASTIC, "LocalElasticAgent")
    registered = grpcio_patch._registered_only()
    assert _overridden(registered, cygrpc.AioServer) - {"__pyx_vtable__"} == _checked(GRPCIO, "AioServer")
    abstract = {each.path.rpartition(":")[2]: set(each.methods) for each in ELASTIC.facts if isinstance(each, Abstract)}
    assert _overridden(launcher._Inherited, LogsSpecs) == abstract["LogsSpecs"]
    assert _overridden(meeting.Meeting, RendezvousHandler) == abstract["RendezvousHandler"]


def test_every_attribute_of_the_agent_has_a_fact() -> None:
    source = inspect.getsource(launcher.GroupAgent)
    own = set(vars(launcher.GroupAgent)) | set(package_guard._stored(launcher.GroupAgent))
    of_torch = {name for each in inspect.getmro(LocalElasticAgent) for name in package_guard._stored(each)}
    assert not own & of_torch
    read = _self_names(source) - own | _self_names(source) & of_torch
    (fact,) = [each for each in ELASTIC.facts if isinstance(each, Attributes) and "LocalElasticAgent" in each.path]
    assert read == set(fact.names)


def _self_names(source: str) -> set[str]:
    """Private attributes of `self` in a class's source."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    names = [node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"]
    return {name for name in names if name.startswith("_")}


def _must_not_run(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the process continued after the check")


def _one_line(capsys: pytest.CaptureFixture[str], start: str) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(start)
    assert "pass-word-7" not in line
    assert "/" not in line
    return line


Change = Callable[[pytest.MonkeyPatch], None]


def _no_agent(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "torch.distributed.elastic.agent.server.local_elastic_agent", None)


def _no_method(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(api.SimpleElasticAgent, "_restart_workers")


def _other_shutdown(patch: pytest.MonkeyPatch) -> None:
    def shutdown(self: Any, death_sig: Any, is_restart: bool) -> None:
        del self, death_sig, is_restart

    patch.setattr(LocalElasticAgent, "_shutdown", shutdown)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_agent, "LocalElasticAgent, "),
        (_no_method, "_restart_workers, "),
        (_other_shutdown, "_shutdown, which has other "),
    ],
)
def test_a_changed_elastic_agent_ends_a_group_before_its_ranks_start(
    change: Change, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "launch", _must_not_run)
    change(monkeypatch)
    assert denoising.main([*WORKER, "--tp", "2"]) == 2
    assert message in _one_line(capsys, "fleet serve denoising: torch: ")


def test_a_changed_collective_ends_a_group(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "launch", _must_not_run)
    monkeypatch.setattr(Operator, "check", lambda self: _raise(Missing(self.name)) if "all_reduce" in self.name else 0)
    assert denoising.main([*WORKER, "--tp", "2"]) == 2
    assert "a worker group relies on _c10d_functional.all_reduce" in _one_line(capsys, "fleet serve denoising: torch: ")


def _raise(error: Exception) -> NoReturn:
    raise error


def test_a_changed_server_ends_services_before_a_port_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "open_model", _must_not_run)
    for function in ("start_coordinator", "start_metrics"):
        monkeypatch.setattr(coordinator, function, _must_not_run)
    monkeypatch.delattr(cygrpc, "AioServer")
    assert stage_services.main("decoding", WORKER) == 2
    assert "AioServer._make_request_call_future, which" in _one_line(capsys, "fleet serve decoding: grpcio: ")
    assert coordinator.main(["--redis", URL, "--metrics-port", "1"]) == 2
    assert "AioServer._make_request_call_future, which" in _one_line(capsys, "coordinator: grpcio: ")


def test_a_server_that_does_not_refuse_unknown_methods_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(check_server())
    real, plain = grpcio_patch._make_server, cygrpc.AioServer
    with monkeypatch.context() as patch:
        patch.setattr(grpcio_patch, "_make_server", lambda _, *rest: real(plain, *rest))
        patch.setattr(grpcio_patch, "_PROBE_SECONDS", 0.05)
        with pytest.raises(UnsupportedPackage, match="which is not called for unknown methods"):
            asyncio.run(check_server())
    assert cygrpc.AioServer is plain


def test_a_worker_checks_its_server_before_it_loads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise UnsupportedPackage("refused")

    monkeypatch.setattr(worker, "check_server", refuse)
    with pytest.raises(UnsupportedPackage, match="refused"):
        asyncio.run(worker.start_worker("decoding", None, None))  # type: ignore[arg-type]


def test_a_scheduler_with_other_attributes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("UniPCMultistepScheduler", (), {"config": {}, "set_begin_index": _must_not_run})
    monkeypatch.setattr("diffusers.UniPCMultistepScheduler", kind)
    monkeypatch.setattr(solver, "check_scheduler", lambda *_: None)
    with pytest.raises(UnsupportedPackage, match=r"relies on diffusers\.UniPCMultistepScheduler\.timesteps"):
        solver.solver_class(kind())


def test_a_language_model_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.glm_image.modeling_glm_image import GlmImageTextModel  # slow to load

    def forward(
        self: Any, input_ids: Any, position_ids: Any, attention_mask: Any, cache: Any, inputs_embeds: Any
    ) -> None:
        del self, input_ids, position_ids, attention_mask, cache, inputs_embeds

    monkeypatch.setattr(GlmImageTextModel, "forward", forward)
    with pytest.raises(UnsupportedPackage, match=r"GlmImageTextModel\.forward, which has other parameters"):
        prior_tokens.PriorTokenSampler(None, None, 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("main", [partial(stage_services.main, "decoding"), denoising.main])
def test_workers_check_versions(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _versions(monkeypatch, torch="2.15.1")
    monkeypatch.setattr(worker, "load_settings", _must_not_run)
    assert main(WORKER) == 2
    assert "torch: 2.15.1 is not >=2.11,<2.14" in _one_line(capsys, "fleet serve de")


def test_fleet_generate_checks_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _versions(monkeypatch, diffusers="0.43.0")
    monkeypatch.setattr("services.cli.local.start_fleet", _must_not_run)
    assert cli.main(["generate", "a cat", "--model", "emoji", "--output", "never.png"]) == 2
    assert "pip install 'diffusers==0.42.1'" in _one_line(capsys, "fleet generate: diffusers: 0.43.0 is not ")


FLEET = ["services.cli", "serve"]


@pytest.mark.parametrize(
    ("command", "package", "version", "prog"),
    [
        ([*FLEET, "coordinator", "--redis", URL], "grpcio", "2.0.0", "fleet serve"),
        ([*FLEET, "decoding", *WORKER], "torch", "2.14.0", "fleet serve"),
        ([*FLEET, "denoising", *WORKER, "--tp", "2"], "transformers", "6.0.0", "fleet serve"),
        (["services.coordinator", "--redis", URL], "grpcio", "1.85.0", "coordinator"),
    ],
)
def test_processes_refuse_another_version(
    command: list[str], package: str, version: str, prog: str, tmp_path: Path
) -> None:
    info = tmp_path / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    versions = SUPPORTED[package].versions
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        f"{prog}: {package}: {version} is not {versions}, the versions that work; pip install '{package}{versions}'"
    ]
