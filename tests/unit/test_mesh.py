"""Degrees of a worker group: world size, limits of a model, and the mesh of a single rank."""

from __future__ import annotations

import pytest
import torch

from common.errors import InvalidInput
from models.parallel import mesh as mesh_module
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh, get_sp_world_size, make_mesh

CPU = torch.device("cpu")


def test_world_size_is_the_product_of_the_degrees() -> None:
    degrees = Degrees(tp=2, ulysses=3, ring=5, cfg=2)
    assert degrees.sp == 15
    assert degrees.world_size == 60
    assert str(degrees) == "tp=2 ulysses=3 ring=5 cfg=2"


@pytest.mark.parametrize("axis", AXES)
def test_degrees_below_one_are_refused(axis: str) -> None:
    with pytest.raises(InvalidInput, match=f"{axis}: 0 is not at least 1; 1 works") as caught:
        Degrees(**{axis: 0})
    assert caught.value.field == axis


@pytest.mark.parametrize(
    ("degrees", "field"),
    [(Degrees(tp=5), "tp"), (Degrees(ulysses=5), "ulysses"), (Degrees(tp=4, ulysses=4), "ulysses")],
)
def test_tp_and_ulysses_must_divide_the_attention_heads(degrees: Degrees, field: str) -> None:
    with pytest.raises(InvalidInput, match=r"24 attention heads; possible .*: 1, 2, 3, 4, 6, 8, 12, 24\.") as caught:
        degrees.check_model(heads=24)
    assert caught.value.field == field


def test_tp_must_divide_the_feed_forward_width() -> None:
    Degrees(tp=4, ulysses=3, ring=7, cfg=2).check_model(heads=12, feed_forward=8960)
    with pytest.raises(InvalidInput, match=r"feed-forward width 8960; possible degrees: 1, 2, 4$"):
        Degrees(tp=3).check_model(heads=12, feed_forward=8960)


def test_one_rank_needs_no_process_group() -> None:
    mesh = make_mesh(Degrees(), CPU)
    assert mesh.rank == mesh.sp_index == 0
    assert [(mesh.size(axis), mesh.index(axis)) for axis in AXES] == [(1, 0)] * 4


def test_a_mesh_larger_than_the_group_is_refused() -> None:
    with pytest.raises(InvalidInput, match="tp=2 ulysses=1 ring=1 cfg=1 requires 2 ranks, but the worker group has 1"):
        make_mesh(Degrees(tp=2), CPU)


@pytest.mark.parametrize(
    ("device", "gpus", "unreachable", "expected"),
    [
        ("cuda", 4, None, True),
        ("cuda", 3, None, True),
        ("cuda", 2, None, False),
        ("cuda", 3, (2, 0), False),
        ("cuda", 4, (3, 0), True),
        ("cpu", 4, None, False),
    ],
)
def test_peer_access_is_required_between_all_gpus_of_a_group(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, unreachable: tuple[int, int] | None, expected: bool
) -> None:
    """Three ranks need peer access in both directions of all pairs."""
    monkeypatch.setattr(mesh_module, "is_usable", lambda name: name == "cuda-bindings")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: pair != unreachable)
    assert mesh_module._have_peer_access(torch.device(device), 3) is expected


def test_sp_index_orders_ulysses_ranks_within_ring_ranks() -> None:
    degrees = Degrees(ulysses=2, ring=3)
    indices = {}
    for ring in range(3):
        for ulysses in range(2):
            axes = {axis: Axis() for axis in AXES} | {"ring": Axis(3, ring), "ulysses": Axis(2, ulysses)}
            indices[ring, ulysses] = WorkerMesh(degrees, CPU, 0, axes).sp_index
    assert [indices[key] for key in sorted(indices)] == [0, 1, 2, 3, 4, 5]


def test_sp_world_size_is_ulysses_times_ring() -> None:
    assert get_sp_world_size(None) == 1
    axes = {axis: Axis() for axis in AXES}
    assert get_sp_world_size(WorkerMesh(Degrees(tp=2, ulysses=2, ring=3, cfg=2), CPU, 0, axes)) == 6
