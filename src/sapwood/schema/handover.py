"""Where a prompt's pages are handed over, from the engine that reads it to the one that answers.

Both engines get the same request, each with the same place: the transfer port of the first engine,
and a room, which is a number that only this request has. Facts: SGLang 0.5.8 (`bootstrap_host`,
`bootstrap_port`, `bootstrap_room`, port 8998).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema.limits import HOST

DEFAULT_PORT = 8998
MAX_ROOM = 2**63 - 1
NO_PEER = "2.2.2.2"
"""A host that stands for nobody: nothing is handed over (SGLang's FAKE_BOOTSTRAP_HOST)."""

T = TypeVar("T", str, int)


class Handover(msgspec.Struct, frozen=True):
    """The place of one request.

    host, port  of the engine that reads the prompt
    room        tells the request from others there
    """

    host: str
    port: int
    room: int


def handovers_of(
    host: str | Sequence[str | None] | None,
    port: int | Sequence[int | None] | None,
    room: int | Sequence[int | None] | None,
    *,
    num_prompts: int,
    num_samples: int,
) -> list[tuple[Handover, ...]]:
    """Per prompt the places of its samples; empty ones if the request names no room.

    Each of the three is one value or a list: an entry for each prompt, or for each sample, those of
    the first prompt first. A room that several samples have stands for itself and the numbers after
    it.
    Raises  InvalidRequest
    """
    if room is None:
        if host is not None:
            raise InvalidRequest(
                "bootstrap_host names an engine, but there is no bootstrap_room; send both, or "
                "neither",
                param="bootstrap_room",
            )
        return [()] * num_prompts
    total = num_prompts * num_samples
    first_rooms = _each("bootstrap_room", room, num_prompts, num_samples)
    num_own = len(room) if isinstance(room, Sequence) else 1
    num_sharing = total // num_own  # samples in a row that have the same number
    rooms = [first + at % num_sharing for at, first in enumerate(first_rooms)]
    hosts = _each("bootstrap_host", host, num_prompts, num_samples)
    ports = _each("bootstrap_port", port, num_prompts, num_samples, default=DEFAULT_PORT)
    if len(set(rooms)) < total:
        raise InvalidRequest(
            "bootstrap_room has one number twice; each sample needs a room of its own",
            param="bootstrap_room",
        )
    places = [_place(*parts) for parts in zip(hosts, ports, rooms, strict=True)]
    return [tuple(places[at : at + num_samples]) for at in range(0, total, num_samples)]


def _place(host: str, port: int, room: int) -> Handover:
    HOST.check(len(host), "bootstrap_host")
    if not host or not host.isprintable() or " " in host:
        raise InvalidRequest(
            "bootstrap_host must be a host's name or address", param="bootstrap_host"
        )
    if not 0 < port < 2**16:
        raise InvalidRequest(
            f"bootstrap_port is {port} but must be from 1 to 65535", param="bootstrap_port"
        )
    if not 0 <= room <= MAX_ROOM:
        raise InvalidRequest(
            f"bootstrap_room is {room} but must be from 0 to 2**63 - 1", param="bootstrap_room"
        )
    return Handover(host, port, room)


def _each(
    name: str,
    given: T | Sequence[T | None] | None,
    num_prompts: int,
    num_samples: int,
    default: T | None = None,
) -> list[T]:
    """The field's value for each sample."""
    total = num_prompts * num_samples
    values: list[T | None]
    if given is None or isinstance(given, str | int):
        values = [given] * total
    elif len(given) == total:
        values = list(given)
    elif len(given) == num_prompts:
        values = [one for one in given for _ in range(num_samples)]
    else:
        raise InvalidRequest(
            f"{name} has {len(given)} entries but the request asks for {total} samples; send one "
            "for each, or one value",
            param=name,
        )
    filled = [default if value is None else value for value in values]
    if any(value is None for value in filled):
        raise InvalidRequest(
            f"{name} is missing; send bootstrap_host and bootstrap_room, or neither", param=name
        )
    return [value for value in filled if value is not None]
