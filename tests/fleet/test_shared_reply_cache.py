"""Text encoders with a shared reply cache. The second worker returns the first worker's replies bit for bit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import REGISTRY

from async_tests import run_bounded, wait_until
from common.artifacts import Conditioning, Prompt, Sampling
from common.codec import pack, unpack
from common.rpc.client import RemoteRunner, open_channel
from common.state.connection import connect
from common.tensors import TORCH
from models.catalog import open_model
from models.registry import load_registry
from redis_servers import RedisServer, running_server
from services.worker import start_worker
from services.worker_settings import CachingSettings
from stage_server import RecordedCall

MODEL = open_model("emoji", load_registry())
LONG = "a red apple " * 90  # truncated with a warning


@dataclass
class EncoderClient:
    """A caller of a text encoding worker."""

    runner: RemoteRunner

    async def encode(self, text: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
        """Embeddings and warnings of a prompt."""
        recorded = RecordedCall()
        given = {
            "prompt": pack("prompt", Prompt(prompt=text, max_sequence_length=64), TORCH),
            "sampling": pack("sampling", Sampling(num_inference_steps=1, seed=1), TORCH),
        }
        outputs = await self.runner(given, recorded.call())
        conditioning = unpack("text_conditioning", Conditioning, outputs["text_conditioning"], TORCH)
        return dict(conditioning.prompt_embeds), recorded.warnings


@asynccontextmanager
async def encoders(url: str, *dtypes: str) -> AsyncIterator[list[EncoderClient]]:
    """Clients of workers that share all replies. Each worker has encoded one prompt to measure the cost of a reply."""
    async with AsyncExitStack() as stack:
        clients = []
        for number, dtype in enumerate(dtypes):
            settings = CachingSettings(
                model="emoji",
                redis=url,
                threads=1,
                device="cpu",
                dtype=dtype,  # type: ignore[arg-type]
                reply_cache_redis_bytes=64 << 20,
                reply_cache_redis_gain=0.0,
            )
            worker = await start_worker("text_encoding", MODEL, settings)
            stack.push_async_callback(worker.stop, 5)
            channel = await stack.enter_async_context(open_channel(worker.address))
            contract = MODEL.service("text_encoding").contract
            client = EncoderClient(RemoteRunner(channel, "text_encoding", contract))
            await client.encode(f"warm-up {number}")
            clients.append(client)
        yield clients


def num_computed() -> float:
    """Replies that the text encoders of this process have computed."""
    labels = {"service": "text_encoding", "model": "emoji", "stage": "TextEncodingStage"}
    return REGISTRY.get_sample_value("fleet_stage_seconds_count", labels) or 0.0


def num_hits() -> float:
    """Replies that the text encoders of this process have read from the shared cache."""
    labels = {"service": "text_encoding", "model": "emoji", "result": "hit"}
    return REGISTRY.get_sample_value("fleet_shared_reply_cache_lookups_total", labels) or 0.0


def run_on_store(test: Callable[[RedisServer], Awaitable[None]]) -> None:
    with running_server("valkey") as server:
        run_bounded(lambda: test(server))


async def wait_for_replies(url: str, count: int) -> None:
    """Wait until the store has `count` replies."""

    async def are_stored() -> bool:
        async with connect(url) as redis:
            return len(await redis.keys("fleet:reply:*")) == count

    await wait_until(are_stored)


def test_worker_reuses_replies_of_another_worker() -> None:
    async def scenario(server: RedisServer) -> None:
        async with encoders(server.url, "float32", "float32", "bfloat16") as (one, other, rounded):
            texts = ("a red apple", LONG)
            first = [await one.encode(text) for text in texts]
            await wait_for_replies(server.url, 5)
            computed, hits = num_computed(), num_hits()
            for text, (embeds, warnings) in zip(texts, first, strict=True):
                for _ in range(2):  # from the store, then from memory
                    again, repeated = await other.encode(text)
                    assert repeated == warnings
                    assert embeds.keys() == again.keys()
                    assert all(torch.equal(embeds[name], again[name]) for name in embeds)
            assert any(warnings for _, warnings in first)
            assert (num_computed(), num_hits()) == (computed, hits + 2)
            await rounded.encode("a red apple")  # replies of other numerics are not shared
            assert (num_computed(), num_hits()) == (computed + 1, hits + 2)

    run_on_store(scenario)


def test_workers_compute_replies_without_the_store() -> None:
    async def scenario(server: RedisServer) -> None:
        async with encoders(server.url, "float32", "float32") as (one, other):
            embeds, _ = await one.encode("a red apple")
            await wait_for_replies(server.url, 3)
            server.kill()
            again, _ = await other.encode("a red apple")
            assert all(torch.equal(embeds[name], again[name]) for name in embeds)
            server.start()

    run_on_store(scenario)
