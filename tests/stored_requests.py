"""Keys of a Redis server as JSON: text, other bytes as base64, and the time to live of each key."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from redis.asyncio import Redis

from common.state.connection import command

STORE = "store"
"""Stem of the file of keys that belong to no single request."""
_REQUEST_ID = "request_id"
_EXPIRES = "fleet:ended"
"""Sorted set of ended requests by the time in ms since the Unix epoch at which their record expires."""

Json: TypeAlias = Any


def _text(data: bytes) -> Json:
    text = data.decode("utf-8", errors="replace")
    return text if text.encode() == data and text.isprintable() else {"base64": base64.b64encode(data).decode()}


def _bytes(value: Json) -> bytes:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else str(value).encode()


def _number(score: bytes) -> float:
    return int(score) if score.isdigit() else float(score)


async def _read(redis: Redis, key: bytes, kind: str) -> Json:
    """The value of a key. Fields of a hash and of a stream entry are text."""
    match kind:
        case "string":
            return _text(await command(redis, "GET", key))
        case "hash":
            return _pairs(await command(redis, "HGETALL", key))
        case "list":
            return [_text(each) for each in await command(redis, "LRANGE", key, 0, -1)]
        case "set":
            return sorted(each.decode() for each in await command(redis, "SMEMBERS", key))
        case "zset":
            rows = _flat(await command(redis, "ZRANGE", key, 0, -1, "WITHSCORES"))
            return [[_text(member), _number(score)] for member, score in zip(rows[::2], rows[1::2], strict=True)]
        case "stream":
            entries = await command(redis, "XRANGE", key, "-", "+")
            return [[entry_id.decode(), _pairs(fields)] for entry_id, fields in entries]
    raise ValueError(f"{key!r}: {kind} is not a type that the fleet stores")


def _flat(reply: Any) -> Sequence[bytes]:
    """A reply as a flat sequence, even if the client has grouped it into pairs."""
    return [
        str(each).encode() if isinstance(each, float) else each
        for row in reply
        for each in (row if isinstance(row, tuple | list) else [row])
    ]


def _pairs(reply: Mapping[bytes, bytes]) -> dict[str, Json]:
    return {field.decode(): _text(value) for field, value in sorted(reply.items())}


def _commands(key: str, kind: str, value: Json, shift_ms: int) -> Iterable[list[Any]]:
    """The commands that write a key. Expiry times of records are moved `shift_ms` later."""
    match kind:
        case "string":
            yield ["SET", key, _bytes(value)]
        case "hash":
            yield ["HSET", key, *(part for field, each in value.items() for part in (field, _bytes(each)))]
        case "list":
            yield ["RPUSH", key, *map(_bytes, value)]
        case "set":
            yield ["SADD", key, *value]
        case "zset":
            later = shift_ms if key == _EXPIRES else 0
            yield ["ZADD", key, *(part for member, score in value for part in (score + later, _bytes(member)))]
        case "stream":
            for entry_id, fields in value:
                pairs = [part for field, each in fields.items() for part in (field, _bytes(each))]
                yield ["XADD", key, entry_id, *pairs]


async def _clock(redis: Redis) -> int:
    seconds, microseconds = await command(redis, "TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def dump_store(redis: Redis, requests: Mapping[str, str], directory: Path) -> None:
    """Write all keys: one file for each of the `requests` (name to id), and one file for all other keys."""
    found: dict[str, dict[str, Json]] = {name: {} for name in (*requests, STORE)}
    for key in sorted(await command(redis, "KEYS", "*")):
        kind = (await command(redis, "TYPE", key)).decode()
        value = await _read(redis, key, kind)
        owner = next((name for name, each in requests.items() if each in key.decode() or each == value), STORE)
        entry = {"type": kind, "ttl_ms": await command(redis, "PTTL", key), "value": value}
        found[owner][key.decode()] = entry
    clock_ms = await _clock(redis)
    for name, keys in found.items():
        head = {_REQUEST_ID: requests[name]} if name in requests else {"clock_ms": clock_ms}
        (directory / f"{name}.json").write_text(json.dumps({**head, "keys": keys}, indent=1, ensure_ascii=False) + "\n")


def read_dump(directory: Path) -> dict[str, Json]:
    """The parsed files of a dump, by stem."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}


async def load_store(redis: Redis, directory: Path) -> dict[str, str]:
    """Write a dump to an empty store, with expiry times relative to now; returns request ids by name."""
    dump = read_dump(directory)
    shift_ms = await _clock(redis) - dump[STORE]["clock_ms"]
    for part in dump.values():
        for key, entry in part["keys"].items():
            for arguments in _commands(key, entry["type"], entry["value"], shift_ms):
                await command(redis, *arguments)
            if entry["ttl_ms"] > 0:
                await command(redis, "PEXPIRE", key, entry["ttl_ms"])
    return {name: part[_REQUEST_ID] for name, part in dump.items() if _REQUEST_ID in part}
