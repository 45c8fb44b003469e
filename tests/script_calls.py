"""Calls of the store script's operations. test_state_damage.py checks that no operation is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLACE, MODEL = "m/denoising", "m"
WIRING = '{"variant":"","supplied":{"canvas":"Canvas"},"read":{"media":"Media"}}'
CONTRACT = '{"inputs":{"canvas":"Canvas"},"optional":[],"outputs":{"media":"Media"}}'
LASTS = 600_000
"""Time to live of every key in ms."""
REPLY_LIMIT = 100
"""Upper bound of the total size of all shared replies in bytes."""


def admission(id: str, owner: str, caller: str = "", **more: Any) -> dict[str, Any]:
    """Arguments of an admission of a request of MODEL."""
    return {
        "id": id,
        "model": MODEL,
        "caller": caller,
        "owner": owner,
        "variant": "",
        "record": "record",
        "submission": "submission",
        "idempotency_key": "",
        "deadline": 0,
        "max_open": 99,
        "max_open_of_caller": 99,
        "max_queued": 99,
        "max_work": 0,
        "is_full": 0,
        "events": ["event"],
        **more,
    }


def claim(ticket: str, owner: str = "c-1", caller: str = "ann", **more: Any) -> dict[str, Any]:
    """Arguments of a claim for a worker slot of PLACE."""
    return {
        "ticket": ticket,
        "owner": owner,
        "place": PLACE,
        "priority": 0,
        "cost": 5,
        "deadline": 0,
        "caller": caller,
        "wiring": "",
        **more,
    }


def announcement(worker: str, model: str = MODEL, capacity: int = 1) -> dict[str, Any]:
    """Arguments of a worker's heartbeat."""
    return {
        "worker": worker,
        "model": model,
        "service": "denoising",
        "capacity": capacity,
        "info": "info",
        "lasts": LASTS,
        "numerics": "numerics",
        "contract": CONTRACT,
        "older": CONTRACT,
    }


def end(id: str, state: str = "3") -> dict[str, Any]:
    """Arguments of a request's end."""
    return {"id": id, "epoch": 1, "state": state, "token": "t", "extra": "", "keep": LASTS, "events": ["end"]}


def cancellation(id: str) -> dict[str, Any]:
    """Arguments of a cancellation."""
    return {"id": id, "state": "5", "token": "c", "keep": LASTS, "events": ["cancelled"]}


def take_over(owner: str, beyond_own: int, *running: str) -> dict[str, Any]:
    """Arguments of a take-over of requests of MODEL."""
    return {"owner": owner, "model": MODEL, "most": 50, "beyond_own": beyond_own, "running": running}


def loss(id: str, worker: str) -> dict[str, Any]:
    """Arguments of a lost call."""
    return {"id": id, "epoch": 1, "worker": worker, "service": "denoising", "stage": 2, "lasts": LASTS}


def kept_reply(name: str, size: int = 40, most: int = REPLY_LIMIT, lasts: int = LASTS) -> dict[str, Any]:
    """Arguments of a shared reply."""
    return {"parts": f"fleet:reply-parts:{name}", "name": name, "bytes": size, "most": most, "lasts": lasts}


OPERATIONS: dict[str, Sequence[Mapping[str, Any]]] = {
    "admit": [
        admission(
            "new", "c-1", "ann", variant="image", idempotency_key="key-new", max_work=1000, costs={"denoising": 5}
        ),
        admission("r1", "c-1", "ann", idempotency_key="key-r1", max_work=1000),
        admission("r9", "c-1", "ann", max_work=1000, costs={"denoising": 5}, wirings={"denoising": WIRING}),
        admission("r2", "c-1", "bob", is_full=1),
    ],
    "append": [
        {"id": f"r{number}", "epoch": 1, "number": 5, "state": "2", "extra": "extra", "events": ["event"]}
        for number in range(5)
    ],
    "finish": [end("r1"), end("r4", "4")],
    "cancel": [cancellation(name) for name in ("r2", "r3", "nothing")],
    "take_over": [take_over("c-1", 1, "r0", "r1"), take_over("c-2", 0), take_over("dead", 1)],
    "death": [loss("r0", "w1"), loss("r1", "w2")],
    "losses": [{"id": name, "epoch": 1} for name in ("r0", "r1", "nothing")],
    "step_checkpoint": [
        {"id": "r0", "epoch": 1, "checkpoint_key": "fleet:checkpoint:r0:1-3", "step": 3},
        {"id": "r1", "epoch": 1, "checkpoint_key": "fleet:checkpoint:r1:1-1", "step": 4},
    ],
    "beat": [{"owner": "c-1", "lasts": LASTS}],
    "resign": [{"owner": "dead"}],
    "declare": [{"model": MODEL, "fingerprint": "print", "lasts": LASTS}],
    "claim": [
        claim("r0/c-1/0"),
        claim("r4/c-1/0", caller="bob"),
        claim("fresh/c-1/0", caller="", priority=5, deadline=1, cost=1),
        claim("r2/c-2/1/first/equal:numerics", "c-2"),
        claim("r9/c-1/2/wiring:0123456789abcdef", wiring=WIRING),
    ],
    "release": [
        {"ticket": "r0/c-1/0", "place": PLACE, "used": 40, "computed": ("1.5", 2)},
        {"ticket": "r3/c-2/0", "place": PLACE, "used": 0},
        {"ticket": "nobody/c-1/0", "place": PLACE, "used": 9},
    ],
    "announce": [announcement("w1")],
    "refuse": [
        {"model": MODEL, "service": "denoising", "fingerprint": name, "worker": "w9", "reason": "another checkpoint"}
        for name in ("other", "third")
    ],
    "refusals": [{"model": MODEL}],
    "leaving": [{"worker": worker, "lasts": LASTS} for worker in ("w2", "nobody")],
    "avoid": [{"owner": owner, "worker": worker} for owner, worker in (("c-1", "w1"), ("c-1", "w1"), ("c-2", "w-new"))],
    "stage_activity": [{"place": PLACE}],
    "stage_load": [{"place": PLACE, "assumed": 10}],
    "spare": [{"place": PLACE, "numerics": "numerics", "contract": CONTRACT}],
    "claims": [{"place": PLACE, "owner": "c-1"}],
    "status": [{"place": PLACE}, {"place": PLACE, "wirings": [WIRING, "no wiring"]}],
    "activities": [{"caller": caller, "most": 20, "places": [PLACE]} for caller in ("", "ann")],
    "touch_reply": [{"name": "a", "lasts": LASTS}],
    "keep_reply": [kept_reply("n"), kept_reply("x", most=10)],
}
"""Arguments for each operation of the script, on the fleet that _build() of test_state_damage.py builds."""
