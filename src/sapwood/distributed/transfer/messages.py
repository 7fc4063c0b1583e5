"""What two engines say to each other while one hands pages to the other.

    decode                     prefill
      │ MAGIC, Hello, Want        │
      │──────────────────────────>│   the room may not be there yet
      │           Alive (each s)  │
      │<─────────────────────────>│
      │           Pages + bytes   │   as chunks of the prompt are computed
      │<──────────────────────────│
      │           Done            │
      │<──────────────────────────│
      │ Received                  │
      │──────────────────────────>│   the leases end

A message is four bytes of length, then msgpack; what comes from a stranger is never more than
`MAX_MESSAGE` bytes, and nothing is unpickled. One connection is one room: bytes that come over it
can only go where this room's `Want` says.
"""

from __future__ import annotations

import msgspec

from sapwood.distributed.transfer.segment import Segment

PROTOCOL = 1
"""Changes when a message or a page's bytes mean something else."""
MAGIC = b"SAPW"
MAX_MESSAGE = 1 << 20
MAX_RUNS = 1 << 12


class Run(msgspec.Struct, frozen=True, array_like=True):
    """Pages of one pool, in a row.

    pool   its index
    first  the page's index in the prompt; of a state: that of the last page before it
    count  how many
    """

    pool: int
    first: int
    count: int


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Opens a connection.

    identity  a digest of all that a page's bytes depend on besides its tokens
    segment   where pages are to be written; None: they are to be sent
    checked   whether each page's bytes come with their sum (CRC-32)
    """

    protocol: int
    identity: str
    page_size: int
    segment: Segment | None = None
    checked: bool = False


class Want(msgspec.Struct, frozen=True, tag=True):
    """Asks for the pages of a room.

    prompt  a digest of the tokens and media that these pages are of
    runs    what is missing; empty: nothing is
    rows    with a segment: the row of each of these pages in its pool
    """

    room: int
    prompt: bytes
    runs: list[Run]
    rows: list[int] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Ends a connection."""

    why: str


class Pages(msgspec.Struct, frozen=True, tag=True):
    """So many pages follow.

    is_placed  they do not follow: they have been written into the segment
    sums       CRC-32 of each page, if they are checked
    """

    pool: int
    first: int
    count: int
    is_placed: bool = False
    sums: list[int] = []


class Done(msgspec.Struct, frozen=True, tag=True):
    """All pages that there are have been sent."""


class Received(msgspec.Struct, frozen=True, tag=True):
    """All of them have come."""


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Nothing new, but I am still here."""


ToPrefill = Hello | Want | Received | Alive
ToDecode = Refused | Pages | Done | Alive
encode = msgspec.msgpack.Encoder().encode
decode_asked = msgspec.msgpack.Decoder(ToPrefill).decode
decode_told = msgspec.msgpack.Decoder(ToDecode).decode
