"""A short deterministic fuzz of all code that parses untrusted bytes. Replays earlier findings, too.

Longer runs: python tests/fleet/fuzz/run_fuzz.py --seconds 600
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_live import all_targets as open_targets
from fuzz_targets import SERVICES, Target, check
from run_fuzz import CORPUS, MOST_GAINED_BYTES, Finding, Hang, Tally, fuzz, fuzz_fast, limited, read_corpus

from async_tests import HANG_SECONDS
from common.errors import InvalidInput, Unavailable

PROTO = Path(__file__).parents[3] / "proto"
EXAMPLES = 15
FAST_EXAMPLES = 200


@pytest.fixture(scope="module")
def all_targets() -> Iterator[dict[str, Target]]:
    with tempfile.TemporaryDirectory() as directory, open_targets(Path(directory)) as every:
        yield {target.name: target for target in every}


def test_inputs_of_the_corpus_cause_no_finding(all_targets: dict[str, Target]) -> None:
    corpus = list(read_corpus())
    assert {path.suffix for path in CORPUS.glob("*/*")} <= {".hex"}
    for target, name, frames in corpus:
        assert target in all_targets, name
        with limited(HANG_SECONDS):
            check(all_targets[target], frames)


def test_valid_inputs_are_accepted(all_targets: dict[str, Target]) -> None:
    """Valid seeds must reach the code behind the parsers."""
    for name, target in all_targets.items():
        if name.startswith(("rpc.", "reply.", "parse.", "rank.")):
            for frames in target.seeds[:2]:
                target.run(frames)
        elif name.startswith("public.") and name != "public.ListModels":
            with pytest.raises(Unavailable):  # the RPC accesses the store last, and the store is unavailable
                target.run(target.seeds[0])
        elif name.startswith("live."):
            target.run(target.seeds[0])
    for name in ("safetensors", "keys", "jwt_keys", "token", "toml", "flags", "checkpoint"):
        all_targets[name].run(all_targets[name].seeds[0])


def test_every_rpc_is_fuzzed(all_targets: dict[str, Target]) -> None:
    files = (PROTO / "fleet" / "v1").glob("*.proto")
    rpcs = {
        f"{service}.{rpc}"
        for file in files
        for service, body in re.findall(r"^service (\w+) \{(.*?)^\}", file.read_text(), re.MULTILINE | re.DOTALL)
        for rpc in re.findall(r"^  rpc (\w+)", body, re.MULTILINE)
    }
    assert len(rpcs) == len(SERVICES) + 9
    fuzzed = {".".join(name.split(".")[-2:]) for name in all_targets if name.startswith("live.fleet.v1.")}
    assert fuzzed == rpcs
    others = {name.rpartition(".")[2] for name in all_targets if name.startswith("live.grpc.")}
    assert {"Check", "Watch", "ServerReflectionInfo"} <= others


def test_a_short_fuzz_finds_nothing(all_targets: dict[str, Target]) -> None:
    for number, target in enumerate(all_targets.values()):
        tally = Tally(HANG_SECONDS)
        fuzz(target, EXAMPLES, number, tally)
        fuzz_fast(target, FAST_EXAMPLES, number, tally)
        assert tally.inputs >= FAST_EXAMPLES, target.name
        assert tally.gained_bytes < MOST_GAINED_BYTES


def test_a_finding_is_reported_with_a_minimal_input() -> None:
    def run(frames: tuple[bytes, ...]) -> None:
        if any(b"!" in frame for frame in frames):
            raise ValueError("not a FleetError")
        raise InvalidInput("an answer")

    with pytest.raises(Finding, match="trap: ValueError") as caught:
        fuzz(Target("trap", run, [(b"a!b",), (b"ab", b"cd")]), 200, 0, Tally(HANG_SECONDS))
    assert sum(map(len, caught.value.frames)) <= 3


def test_too_much_memory_for_one_input_is_a_finding() -> None:
    def run(frames: tuple[bytes, ...]) -> None:
        if any(b"!" in frame for frame in frames):
            bytearray(64 << 20)[:: 1 << 12] = bytes(1 << 14)
        raise InvalidInput("an answer")

    with pytest.raises(Finding, match="trap: MemoryError: "):
        fuzz_fast(Target("trap", run, [(b"a!b",)], most_bytes=32 << 20), 50, 0, Tally(HANG_SECONDS))


def test_a_hang_is_a_finding() -> None:
    def spin() -> None:
        while True:
            pass

    with pytest.raises(Hang), limited(0.05):
        spin()
