"""The external scaler of a model whose variants use different stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from PIL import Image

from async_tests import HANG_SECONDS, wait_until
from coarse_images import png
from common.rpc.client import open_channel
from coordinator_fleet import running_fleet, terminal
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from fleet.v1 import generation_pb2
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from services.cli.parameters import parameters_message
from toy_checkpoint import build_twin_checkpoint, twin_family

STAGES = ("text_encoding", "image_encoding", "latent_preparation", "denoising", "decoding")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The twin model; only its variant "image" uses image_encoding."""
    with twin_family(tmp_path_factory.mktemp("plugins")) as plugins:
        path = build_twin_checkpoint(tmp_path_factory.mktemp("models") / "twin")
        yield open_model(str(path), load_registry(plugins))


def request(**images: bytes) -> generation_pb2.SubmitRequest:
    """A request; its images select the variant."""
    return generation_pb2.SubmitRequest(
        parameters=parameters_message({"prompt": "a leaf"}, list(images.items()), ".png")
    )


def test_stage_unused_by_a_variant_needs_no_worker(store_url: str, twin: ServedModel) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(HANG_SECONDS), running_fleet(store_url, twin) as fleet:
            coordinator, stub = await fleet.add_coordinator(scaler_listen=f"unix:{fleet.directory}/scaler.sock")
            async with open_channel(coordinator.scaler_address) as channel:
                scaler: externalscaler_pb2_grpc.ExternalScalerAsyncStub
                scaler = externalscaler_pb2_grpc.ExternalScalerStub(channel)

                async def active() -> dict[str, bool]:
                    found = {}
                    for stage in STAGES:
                        metadata = {"model": twin.name, "stage": stage, "targetSeconds": "30"}
                        target = pb.ScaledObjectRef(name=stage, scalerMetadata=metadata)
                        found[stage] = (await scaler.IsActive(target)).result
                    return found

                assert not any((await active()).values())
                text = (await stub.Submit(request())).request.request_id
                assert await active() == {stage: stage != "image_encoding" for stage in STAGES}
                image = (await stub.Submit(request(image=png(Image.new("RGB", (20, 12), "red"))))).request.request_id
                assert all((await active()).values())
                await stub.CancelRequest(generation_pb2.CancelRequestRequest(request_id=image))
                await terminal(stub, image)
                assert await active() == {stage: stage != "image_encoding" for stage in STAGES}
                await stub.CancelRequest(generation_pb2.CancelRequestRequest(request_id=text))

                async def none_is_active() -> bool:
                    return not any((await active()).values())

                await wait_until(none_is_active)

    asyncio.run(scenario())
