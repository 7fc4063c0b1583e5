"""KV events: what an engine publishes of the pages in its prefix cache, in SGLang's wire format.

A message has three frames: the topic, its number as 8 bytes (big-endian), and a batch in msgpack.
Batches and events are arrays, so a reader that knows fewer fields skips those behind. On the wire a
page is called a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from sapwood.base.errors import ConfigError

DEVICE_TIER = "GPU"
"""The format's word for the memory that the engine computes in, on any device."""
HOST_TIER = "CPU"
STORAGE_TIER = "DISK"
"""For any storage, wherever it is."""

END_OF_REPLAY = -1
"""The number after the last message that is sent again."""

_PUBLISHERS = ("null", "zmq")
_MOST = 10_000_000


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=True):
    """Prefixes that go through this page can be reused from now on.

    block_hashes       one hash, see `PageHash`
    parent_block_hash  of the page before; None: the page is the first one
    token_ids          of the page
    block_size         tokens of the page
    lora_id            stands for the name of the adapter; None: the base model
    medium             the tier that has the page
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=True):
    """That tier has these pages no more; without a medium, none has."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """No tier has any page."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """ts: seconds since 1970; attn_dp_rank: number of the replica whose pages these are"""

    ts: float
    events: list[KVEvent]
    attn_dp_rank: int | None = None


class PageHash:
    """The hash of a page: SHA-256 of the page before's hash and the page's tokens, 4 bytes each
    (little-endian). Its first 8 bytes as a signed number are the page's name in events.

    Before the first page of a namespace comes the hash of the namespace's name, so that tenants and
    adapters have different pages for equal tokens; nothing comes there without a namespace, as with
    SGLang."""

    @staticmethod
    def seed(namespace: str) -> bytes:
        """What stands before the first page."""
        return (
            hashlib.sha256(namespace.encode("utf-8", "surrogatepass")).digest()
            if namespace
            else b""
        )

    @staticmethod
    def of(before: bytes, tokens: bytes) -> bytes:
        return hashlib.sha256(before + tokens).digest()

    @staticmethod
    def name(digest: bytes) -> int:
        return int.from_bytes(digest[:8], "big", signed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """What the JSON of --kv-events-config says.

    publisher        "zmq", or "null" for none
    endpoint         where events go; bound if it has a `*` or `::`, or is ipc or inproc, else
                     connected
    replay_endpoint  where messages can be asked for again; None: nowhere
    buffer_steps     messages that are kept for that
    hwm              messages that wait for a slow subscriber; it misses more
    max_queue_size   events that wait to be sent; more are dropped, and counted
    topic            the first frame
    """

    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def is_on(self) -> bool:
        return self.publisher != "null"

    @classmethod
    def parse(cls, text: str | None) -> KVEventsConfig:
        """ConfigError if the text is not such JSON."""
        if not text:
            return cls()
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--kv-events-config is no JSON: {error}") from None
        if not isinstance(told, Mapping):
            raise ConfigError(
                '--kv-events-config must be a JSON object, such as {"publisher": "zmq"}'
            )
        known = {one.name: one.type for one in fields(cls)}
        for name, value in told.items():
            if name not in known:
                raise ConfigError(
                    f"--kv-events-config has {name!r}, but knows only {', '.join(known)}"
                )
            _check_type(name, value, is_number=known[name] == "int")
        config = cls(**told)
        if config.publisher not in _PUBLISHERS:
            raise ConfigError(
                f"--kv-events-config has the publisher {config.publisher!r} but must have one of "
                f"{', '.join(_PUBLISHERS)}"
            )
        for endpoint in (config.endpoint, config.replay_endpoint):
            if endpoint is not None:
                of_rank(endpoint, 0)
        if config.endpoint == config.replay_endpoint:
            raise ConfigError("--kv-events-config has the same endpoint twice")
        return config


def _check_type(name: str, value: Any, *, is_number: bool) -> None:
    if is_number:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise ConfigError(
                f"--kv-events-config has {name} {value!r} but must have a number from 1 to {_MOST}"
            )
    elif not isinstance(value, str) and not (value is None and name == "replay_endpoint"):
        raise ConfigError(f"--kv-events-config has {name} {value!r} but must have a text")


def of_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a replica: its number is added to a tcp port, and to another name.

    Raises  ConfigError if that is no endpoint
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or not rest or scheme not in ("tcp", "ipc", "inproc"):
        raise ConfigError(
            f"{endpoint!r} is no endpoint of KV events; it must begin with tcp://, ipc:// or "
            "inproc://, as tcp://*:5557"
        )
    if scheme != "tcp":
        return f"{endpoint}_dp{rank}" if rank else endpoint
    host, _, port = rest.rpartition(":")
    if (
        not host
        or not (port.isascii() and port.isdecimal())
        or not 0 < int(port[:6]) + rank < 2**16
    ):
        raise ConfigError(
            f"{endpoint!r} must name a host and a port that is, with the number of the replica "
            "added, below 65536, as tcp://*:5557"
        )
    return f"tcp://{host}:{int(port) + rank}"


def is_bound(endpoint: str) -> bool:
    """Whether the engine binds the endpoint; it connects to any other."""
    return not endpoint.startswith("tcp://") or "*" in endpoint or "::" in endpoint.split("//")[1]
