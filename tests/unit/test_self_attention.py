"""Self-attention that writes keys and values into gather buffers, compared with plain attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from models.dits.flux2 import Flux2ParallelSelfAttention
from models.kernels.copy_streams import CopyStreams
from models.layers import attention as attention_module
from models.layers.attention import Attention, KeyValues, SelfAttention
from models.layers.joint_attention import JointAttention
from models.layers.linear import JoinedLinear, Linear, project
from models.layers.rotary import rotary_embedding
from models.parallel import usp_attention
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh
from models.parallel.peer_gather import Gathered, PeerGather
from models.parallel.peer_memory import PeerMemory
from models.parallel.segment_lengths import SegmentScope
from models.parallel.usp_attention import USPAttention
from models.token_segments import TokenSegments

CPU = torch.device("cpu")
SIZE, HEAD, TOKENS, TEXT_TOKENS = 32, 8, 6, 2


class NoStreams:
    """Copy streams of a rank without peers, on which every operation is synchronous."""

    side = current = None

    def await_stream(self, waiting: object, other: object) -> None:
        """Return at once."""


def gather_attention() -> USPAttention:
    """Attention of one rank that gathers the keys and values of TOKENS tokens in peer memory."""
    axes = {axis: Axis() for axis in AXES}
    scope = SegmentScope(1, 0)
    gather = PeerGather(Axis(), CPU, cast("CopyStreams", NoStreams()), _allocate)
    return USPAttention(WorkerMesh(Degrees(), CPU, 0, axes), scope, gather)


def _allocate(axis: Axis, device: torch.device, size: int) -> PeerMemory:
    del axis
    own = torch.zeros(size, dtype=torch.uint8, device=device)
    return PeerMemory(own, [own.data_ptr()])


def random_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("joined", [False, True], ids=["separate weights", "joined weights"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_gathered_self_attention_equals_plain_self_attention(joined: bool, batch: int) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(SIZE, HEAD)
    random_weights(attention)
    if joined:
        attention.join_weights()
    x, rotation = torch.randn(batch, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    expected = attention.finish(attention.start(x, rotation))
    assert torch.equal(attention(x, rotation), expected)
    attention.inner = parallel = gather_attention()
    with parallel.scope.entered({"image": TOKENS}):
        torch.testing.assert_close(attention(x, rotation), expected)
        torch.testing.assert_close(attention.finish(attention.start(x, rotation)), expected)
        wide = torch.zeros(batch, TOKENS, SIZE + 4)
        out = wide[..., 4:]
        assert attention.finish(attention.start(x, rotation), out) is out
    torch.testing.assert_close(out, expected)
    assert not wide[..., :4].any()


@torch.inference_mode()
def test_gathered_joint_attention_equals_plain_joint_attention() -> None:
    torch.manual_seed(0)
    attention = JointAttention(SIZE, HEAD)
    random_weights(attention)
    attention.join_weights()
    x, rotation = torch.randn(2, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    segments = TokenSegments((TEXT_TOKENS, TOKENS - TEXT_TOKENS))
    expected = attention.joint(x, rotation, segments)
    attention.inner = parallel = gather_attention()
    with parallel.scope.entered({"text": TEXT_TOKENS, "image": TOKENS - TEXT_TOKENS}):
        torch.testing.assert_close(attention.joint(x, rotation, segments), expected)


@torch.inference_mode()
def test_gathered_attention_parallel_to_a_feed_forward_equals_plain_attention() -> None:
    """One GEMM projects the inputs of attention and feed-forward."""
    torch.manual_seed(0)
    attention = Flux2ParallelSelfAttention(SIZE, HEAD)
    random_weights(attention)
    x, rotation = torch.randn(2, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    expected = attention(x, rotation)
    attention.inner = parallel = gather_attention()
    with parallel.scope.entered({"image": TOKENS}):
        torch.testing.assert_close(attention(x, rotation), expected)


@torch.inference_mode()
def test_gathered_attention_equals_plain_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, TOKENS, 4, HEAD).unbind()
    parallel = gather_attention()
    with parallel.scope.entered({"image": TOKENS}):
        torch.testing.assert_close(parallel(q, k, v), Attention()(q, k, v))


ALL_PARTS, KEYS_AND_VALUES, QUERIES = (0, 1, 2), (1, 2), (0,)
PEER, NCCL, SINGLE = "peer memory", "messages", "one device"


@pytest.mark.parametrize("form", [SINGLE, PEER, NCCL])
@torch.inference_mode()
def test_a_direct_call_sends_keys_and_values_before_it_projects_queries(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Without other work, ranks send keys and values while they project queries: two GEMMs instead of one."""
    order: list[tuple[int, ...] | str] = []

    def project_some(
        x: Tensor, out: Tensor, joined: JoinedLinear | None, layers: Sequence[Linear], which: slice
    ) -> None:
        order.append(tuple(range(3))[which])
        project(x, out, joined, layers, which)

    class Recording(KeyValues):
        """Stands for a transfer to other ranks: records its construction as "sent"."""

        def __init__(self, k: Tensor, v: Tensor) -> None:
            super().__init__(k, v)
            order.append("sent")

    attention = SelfAttention(SIZE, HEAD)
    random_weights(attention)
    x, rotation = torch.randn(1, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    monkeypatch.setattr(attention_module, "project", project_some)
    scope = SegmentScope(1, 0)
    if form != SINGLE:
        attention.inner = parallel = gather_attention()
        scope = parallel.scope
        if form == NCCL:
            parallel.gather = None
            monkeypatch.setattr(usp_attention, "KeyValues", Recording)
        else:
            monkeypatch.setattr(Gathered, "send", lambda _: order.append("sent"))
    orders = []
    with scope.entered({"image": TOKENS}):
        for run in (lambda: attention(x, rotation), lambda: attention.finish(attention.start(x, rotation))):
            run()
            orders.append([*order])
            order.clear()
    sent = [] if form == SINGLE else ["sent"]
    direct = [ALL_PARTS] if form == SINGLE else [KEYS_AND_VALUES, "sent", QUERIES]
    assert orders == [direct, [ALL_PARTS, *sent]]
