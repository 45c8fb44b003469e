"""Runs stages in the current process."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from common.errors import InternalError, InvalidInput
from common.stage import Call, Contract, PipelineStage, compose_contracts
from common.streams import DeviceLock, ItemBuffer, StreamFeed, byte_size_of, densified, wait_on_thread


def untimed(_: str) -> AbstractContextManager[None]:
    """Return a context that measures nothing."""
    return nullcontext()


class HostedStages:
    """Runs consecutive stages of one service as one function from input slots to output slots.

    `timed` returns the context in which a stage of the given name runs, for example a timer.
    """

    def __init__(
        self,
        name: str,
        stages: Sequence[PipelineStage[Any, Any]],
        *,
        timed: Callable[[str], AbstractContextManager[None]] = untimed,
    ) -> None:
        self.contract = compose_contracts(name, [stage.contract for stage in stages])
        self._stages = tuple(stages)
        self.indifferent_to = common_indifference([stage.indifferent_to for stage in stages])
        self._timed = timed

    def contract_of(self, variant: str) -> Contract:
        """Return the contract. Raises InvalidInput for a non-empty `variant`: the model has one, unnamed variant."""
        if variant:
            message = f"variant: {variant[:80]!r} is not a variant of this model; the empty variant works"
            raise InvalidInput(message, field="variant")
        return self.contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Run the stages in order on artifacts by slot. Returns the contract's outputs, except streams."""
        slots = dict(values)
        for stage in self._stages:
            call.check_cancelled()
            inputs = {name: slots[name] for name in stage.contract.inputs if name in slots}
            with self._timed(stage.contract.name):
                output = stage.run(stage.Input(**inputs), call)
            slots.update(_outputs_of(stage, output))
        return {name: slots[name] for name in self.contract.outputs.keys() - self.contract.output_streams}


def _outputs_of(stage: PipelineStage[Any, Any], output: object) -> dict[str, Any]:
    """Return a stage's output artifacts by slot, densified, except streams. Raises InternalError if one is None."""
    streams = stage.contract.output_streams
    outputs = {name: densified(getattr(output, name)) for name in stage.contract.outputs if name not in streams}
    if absent := [name for name, artifact in outputs.items() if artifact is None]:
        raise InternalError(f"{stage.contract.name} did not return {', '.join(absent)}")
    return outputs


def common_indifference(declared: Sequence[frozenset[str] | None]) -> frozenset[str] | None:
    """Return the input fields that no output depends on; None if a stage's replies must not be cached."""
    named = [each for each in declared if each is not None]
    return frozenset.intersection(*named) if named and len(named) == len(declared) else None


class LocalRunner:
    """Runs stages on one thread of this process. Values are artifacts; in common.rpc.client.RemoteRunner, packets.

    `executor` has one thread, because stages of one device must not interleave; several runners may share it. Stages
    with stream inputs run on a separate thread. They release `device`, a lock that all runners of a device share, while
    they wait for items.
    """

    def __init__(self, stages: HostedStages, executor: ThreadPoolExecutor, device: DeviceLock | None = None) -> None:
        self._stages = stages
        self._executor = executor
        self._device = device or DeviceLock()

    @property
    def contract(self) -> Contract:
        """Contract of all stages together."""
        return self._stages.contract

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        """Run the stages on the executor's thread, or on a separate thread if the stages read streams.

        This thread also invokes the callbacks of `call`.
        """
        loop = asyncio.get_running_loop()
        call = dataclasses.replace(call, waiting=self._device.released, emitted={})
        call = dataclasses.replace(call, on_item=partial(_put_item, loop, call))
        try:
            if not self.contract.input_streams:
                return await loop.run_in_executor(self._executor, self._run, values, call)
            return await self._run_session(values, call)
        except asyncio.CancelledError:
            call.cancelled.set()
            raise

    async def _run_session(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        """Run stages with stream inputs, concurrently with the writers of the streams."""
        feeds = {slot: StreamFeed(call) for slot in self.contract.input_streams}
        pumps = [asyncio.create_task(_pump(values[slot], feed)) for slot, feed in feeds.items()]
        try:
            return await asyncio.to_thread(self._run, {**values, **feeds}, call)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _run(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        call.check_cancelled()
        with self._device:
            call.on_begun()
            return self._stages.run(values, call)


async def _pump(source: ItemBuffer, feed: StreamFeed) -> None:
    """Forward the items of a stream to the thread of its reader."""
    async for item, byte_size in source.read():
        await feed.put(item, byte_size)
    feed.close()


def _put_item(loop: asyncio.AbstractEventLoop, call: Call, slot: str, index: int, item: Any) -> None:
    """Put an item into its sink. Called on the thread of the emitting stage; blocks while the sink is full."""
    if (sink := call.sinks.get(slot)) is not None:
        wait_on_thread(loop, sink.put(index, densified(item), byte_size_of(item)), call)
