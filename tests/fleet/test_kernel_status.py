"""ListModels returns the kernel packages of a service's workers, without duplicates."""

from __future__ import annotations

from coordinator_fleet import FakeFleet, run_on_fleet
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2


def test_kernel_packages_of_all_workers_are_listed_once(store_url: str) -> None:
    working = worker_pb2.KernelPackage(name="triton", version="3.6.0")
    broken = worker_pb2.KernelPackage(name="fa3-fwd", version="0.0.3", error="OSError: a", replacement="cuDNN")

    async def scenario(running: FakeFleet) -> None:
        _, stub = await running.add_coordinator()
        for kernels in ([working], [working, broken]):
            worker = await running.add_worker("denoising")
            worker.info.kernels.extend(kernels)
            await worker.registry.announce(worker.info)
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        found = {each.service: list(each.kernels) for each in model.services if each.kernels}
        assert found == {"denoising": [broken, working]}

    run_on_fleet(store_url, scenario)
