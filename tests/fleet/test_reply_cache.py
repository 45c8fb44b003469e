"""The reply cache: equal inputs, except for ignored fields, get equal replies; the size is bounded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from async_tests import run_bounded
from common.artifacts import Conditioning, Latents, Prompt, Sampling
from common.codec import pack, unpack
from common.errors import InvalidInput
from common.rpc.client import RemoteRunner, open_channel
from common.rpc.framing import Packet
from common.rpc.replies import ReplyCache
from common.stage import Call
from common.tensors import TORCH
from models.catalog import open_model
from models.registry import load_registry
from models.stages.decoding import DecodingStage
from models.stages.denoising import DenoisingStage
from models.stages.image_text_encoding import ImageTextEncodingStage
from models.stages.text_encoding import TextEncodingStage
from services.worker import start_worker
from services.worker_settings import CachingSettings
from stage_server import RecordedCall, Served, StageInput, artifacts, packets, served

SEED = "sampling.seed"


def new_cache(max_bytes: int = 1 << 20, *, model: str = "m", indifferent_to: tuple[str, ...] = ()) -> ReplyCache:
    return ReplyCache(max_bytes, service="s", model=model, indifferent_to=indifferent_to)


def lookups(model: str, result: str, service: str = "s") -> float:
    labels = {"service": service, "model": model, "result": result}
    return REGISTRY.get_sample_value("fleet_reply_cache_lookups_total", labels) or 0.0


def packed(**slots: Any) -> dict[str, Packet]:
    return {slot: pack(slot, artifact, TORCH) for slot, artifact in slots.items()}


def test_cache_evicts_least_recently_used_replies() -> None:
    cache = new_cache(3 * (1000 + 256))
    for name in (b"a", b"b", b"c"):
        cache.put(name, (bytes(400), bytes(600)))
    assert cache.get(b"a") == (bytes(400), bytes(600))
    cache.put(b"d", (bytes(1000),))
    assert cache.get(b"b") is None
    assert [cache.get(name) is not None for name in (b"a", b"c", b"d")] == [True] * 3
    cache.put(b"huge", (bytes(4000),))
    assert cache.get(b"huge") is None
    assert cache.used_bytes == 3 * 1256 <= cache.max_bytes
    cache.put(b"e", (bytes(3000),))
    assert (cache.get(b"a"), cache.used_bytes) == (None, 3256)


def test_cache_key_covers_every_bit_of_the_inputs() -> None:
    prompt = Prompt(prompt="a", max_sequence_length=8)
    sampling = Sampling(num_inference_steps=2, seed=1)
    tensor = torch.arange(30_000, dtype=torch.float32)
    other = tensor.clone()
    other[-1] = torch.nextafter(other[-1], torch.tensor(0.0))
    given = {"prompt": prompt, "sampling": sampling, "text": Conditioning(prompt_embeds={"x": tensor})}
    variants: list[dict[str, Any]] = [
        given,
        given | {"prompt": replace(prompt, prompt="b")},
        given | {"prompt": replace(prompt, prompt_2="a")},
        given | {"prompt": replace(prompt, max_sequence_length=9)},
        given | {"prompt": replace(prompt, negative_prompt="")},
        given | {"sampling": replace(sampling, true_cfg_scale=1.0)},
        given | {"text": Conditioning(prompt_embeds={"x": other})},
        given | {"text": Conditioning(prompt_embeds={"y": tensor})},
        given | {"text": Conditioning(prompt_embeds={"x": tensor.reshape(2, -1)})},
        given | {"text": Conditioning(prompt_embeds={"x": tensor[:10]})},
        {"prompt": prompt, "sampling": sampling},
    ]
    keyed = new_cache(indifferent_to=(SEED,))
    keys = [keyed.key(packed(**variant)) for variant in variants]
    assert len(set(keys)) == len(variants)
    assert keyed.key(packed(**dict(reversed(given.items())))) == keys[0]
    reseeded = packed(**given | {"sampling": replace(sampling, seed=2)})
    assert keyed.key(reseeded) == keys[0]
    assert unpack("sampling", Sampling, reseeded["sampling"]).seed == 0
    assert new_cache().key(packed(**given | {"sampling": replace(sampling, seed=2)})) not in keys


class CountingScript:
    """A script that records the seed of each call, reports a warning and progress, and refuses 13 steps."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, x: StageInput, call: Call) -> None:
        self.seeds.append(x.sampling.seed)
        if x.sampling.num_inference_steps == 13:
            raise InvalidInput("no")
        call.warn("prompt", "truncated")
        call.progress(1, 1)


def run_with_cache(test: Callable[[Served, CountingScript], Awaitable[None]], cache: ReplyCache) -> None:
    """Run a test on a scripted stage with a reply cache."""

    async def on_stage() -> None:
        script = CountingScript()
        async with served(script, cache=cache) as stage:
            await test(stage, script)
            assert not stage.servicer.in_flight

    run_bounded(on_stage)


def latents_of(outputs: Any) -> torch.Tensor:
    return unpack("denoised_latents", Latents, outputs["denoised_latents"], TORCH).parts["image"].latents


@pytest.mark.parametrize("count", [10, 300_000])
def test_repeated_inputs_are_answered_from_the_cache(count: int) -> None:
    model = f"repeated-{count}"

    async def test(stage: Served, script: CountingScript) -> None:
        found = []
        for seed in (1, 1, 2):
            recorded = RecordedCall()
            outputs = await stage.runner()(
                packets(count, sampling=Sampling(num_inference_steps=3, seed=seed)), recorded.call()
            )
            found.append((latents_of(outputs), recorded.warnings, recorded.progress))
        assert script.seeds == [0]
        assert torch.equal(found[0][0], artifacts(count)["initial_latents"].parts["image"].latents * 3)
        for latents, warnings, progress in found[1:]:
            assert torch.equal(latents, found[0][0])
            assert (warnings, progress) == ([("prompt", "truncated")], [(1, 1)])
        assert (lookups(model, "hit"), lookups(model, "miss")) == (2, 1)
        await stage.runner()(packets(count, sampling=Sampling(num_inference_steps=4, seed=1)), RecordedCall().call())
        assert script.seeds == [0, 0]

    run_with_cache(test, new_cache(8 << 20, model=model, indifferent_to=(SEED,)))


def test_failures_and_large_replies_are_not_cached() -> None:
    async def test(stage: Served, script: CountingScript) -> None:
        for _ in range(2):
            with pytest.raises(InvalidInput):
                await stage.runner()(
                    packets(8, sampling=Sampling(num_inference_steps=13, seed=1)), RecordedCall().call()
                )
            await stage.runner()(packets(300_000), RecordedCall().call())
        assert len(script.seeds) == 4

    run_with_cache(test, new_cache(100_000))


def test_only_text_encoding_caches_replies() -> None:
    assert (
        ImageTextEncodingStage.indifferent_to
        == TextEncodingStage.indifferent_to
        == {SEED, "sampling.num_inference_steps"}
    )
    assert DenoisingStage.indifferent_to is DecodingStage.indifferent_to is None


def test_cached_replies_of_a_worker_equal_computed_ones(store_url: str) -> None:
    model = open_model("emoji", load_registry())
    spec = model.service("text_encoding")

    def inputs(text: str, seed: int, length: int = 64) -> dict[str, Packet]:
        prompt = Prompt(prompt=text, max_sequence_length=length)
        return packed(prompt=prompt, sampling=Sampling(num_inference_steps=seed, seed=seed))

    async def encode(runner: RemoteRunner, given: dict[str, Packet]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        recorded = RecordedCall()
        outputs = await runner(given, recorded.call())
        conditioning = unpack("text_conditioning", Conditioning, outputs["text_conditioning"], TORCH)
        return dict(conditioning.prompt_embeds), recorded.warnings

    async def test() -> None:
        found = []
        before = {result: lookups("emoji", result, "text_encoding") for result in ("hit", "miss")}
        for reply_cache_bytes in (0, 64 << 20):
            settings = CachingSettings(
                model="emoji", redis=store_url, threads=1, device="cpu", reply_cache_bytes=reply_cache_bytes
            )
            worker = await start_worker("text_encoding", model, settings)
            try:
                async with open_channel(worker.address) as channel:
                    runner = RemoteRunner(channel, "text_encoding", spec.contract)
                    asked = (inputs("a red apple", 1), inputs("a red apple " * 90, 2), inputs("a red apple", 3, 8))
                    again = (inputs("a red apple", 4), inputs("a red apple " * 90, 5), inputs("a red apple", 6, 8))
                    found.append([await encode(runner, each) for each in (*asked, *again)])
            finally:
                await worker.stop(5)
        computed, cached = found
        assert any(warnings for _, warnings in computed)
        for (embeds, warnings), (other_embeds, other_warnings) in zip(computed, cached, strict=True):
            assert warnings == other_warnings
            assert embeds.keys() == other_embeds.keys()
            assert all(torch.equal(embeds[name], other_embeds[name]) for name in embeds)
        assert not torch.equal(computed[0][0]["encoder_hidden_states"], computed[1][0]["encoder_hidden_states"])
        for result, count in before.items():
            assert lookups("emoji", result, "text_encoding") - count == 3

    run_bounded(test)
