"""Pages get from one engine's memory to another's, and only where they were wanted."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from queue import Empty
from typing import Any

import msgspec
import numpy as np
import pytest

from sapwood.distributed.transfer import messages, sending
from sapwood.distributed.transfer.facts import PageFacts
from sapwood.distributed.transfer.messages import MAGIC, Hello, Run, Want
from sapwood.distributed.transfer.receiving import Fetched, Freed, Order, PageReceiver
from sapwood.distributed.transfer.segment import OwnSegment, PeerSegment
from sapwood.distributed.transfer.sending import Batch, Ended, Joined, PageSender, Read
from sapwood.schema.handover import Handover

FACTS = PageFacts(identity="model", page_size=16, row_bytes=(4096, 100))
PROMPT = b"p" * 32
RNG = np.random.default_rng(0)
PAGES = [
    [RNG.integers(0, 256, 3000, np.uint8), RNG.integers(0, 256, 1096, np.uint8)] for _ in range(70)
]
STATE = [RNG.integers(0, 256, 100, np.uint8)]


@pytest.fixture
def sender() -> Iterator[PageSender]:
    with closing(PageSender("127.0.0.1", 0, FACTS, silence_s=1.5)) as sender:
        yield sender


def next_of(events: Any, kind: type) -> Any:
    event = events.get(timeout=10)
    assert isinstance(event, kind), event
    return event


def receiver(facts: PageFacts = FACTS, *, memory: OwnSegment | None = None, **more: Any) -> Any:
    rows = [np.zeros((100, 4096), np.uint8), np.zeros((4, 100), np.uint8)]
    segment = None
    if memory is not None:
        rows, segment = memory.rows, memory.place
    return closing(PageReceiver(facts, rows, segment, **more)), rows


def order(sender: PageSender, room: int = 7, *, first: int = 2, count: int = 68) -> Order:
    runs = [Run(0, first, count), Run(1, 69, 1)]
    rows = [*range(count), 3]
    place = Handover("127.0.0.1", sender.port, room)
    return Order(number=1, place=place, prompt=PROMPT, runs=runs, rows=rows)


@pytest.mark.parametrize("shares_memory", [False, True], ids=["tcp", "shared"])
def test_pages_arrive_where_they_were_wanted(sender: PageSender, shares_memory: bool) -> None:
    memory = OwnSegment([(100, 4096), (4, 100)]) if shares_memory else None
    context, rows = receiver(memory=memory, checks=True, needs_segment=shares_memory)
    with context as wants:
        wants.fetch(order(sender))  # before the room is there
        sender.offer(7, PROMPT)
        assert next_of(sender.events, Joined).runs == [Run(0, 2, 68), Run(1, 69, 1)]
        sender.send(7, Batch(1, 0, 2, PAGES[2:40]))
        sender.send(7, Batch(2, 0, 40, PAGES[40:]))
        sender.send(7, Batch(3, 1, 69, [STATE]))
        sender.finish(7)
        fetched = next_of(wants.events, Fetched)
        assert fetched.why == ""
        assert fetched.arrived == {(0, at) for at in range(2, 70)} | {(1, 69)}
        next_of(wants.events, Freed)
    assert [next_of(sender.events, Read).token for _ in range(3)] == [1, 2, 3]
    assert next_of(sender.events, Ended) == Ended(7)
    for at in range(68):
        assert np.array_equal(rows[0][at], np.concatenate(PAGES[2 + at]))
    assert np.array_equal(rows[1][3], STATE[0])
    if memory is not None:
        memory.close()


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (PageFacts(identity="model", page_size=32, row_bytes=(4096, 100)), "--page-size"),
        (PageFacts(identity="other", page_size=16, row_bytes=(4096, 100)), "do not compute"),
    ],
)
def test_engines_that_differ_are_refused_by_name(
    sender: PageSender, facts: PageFacts, word: str
) -> None:
    sender.offer(7, PROMPT)
    context, _ = receiver(facts)
    with context as wants:
        wants.fetch(order(sender))
        assert word in next_of(wants.events, Fetched).why
    with pytest.raises(Empty):
        sender.events.get(timeout=0.1)  # the room is still free


def test_another_version_is_refused_by_name(
    sender: PageSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "PROTOCOL", messages.PROTOCOL + 1)
    context, _ = receiver()
    with context as wants:
        wants.fetch(order(sender))
        assert "version 1 of the transfer protocol" in next_of(wants.events, Fetched).why


def test_a_room_is_given_to_its_prompt_and_once(
    sender: PageSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "ROOM_WAIT_S", 0.0)
    sender.offer(7, PROMPT)
    context, _ = receiver()
    with context as wants:
        wants.fetch(order(sender, room=8))
        assert "no request has the room 8" in next_of(wants.events, Fetched).why
        next_of(wants.events, Freed)
        first = order(sender)
        wants.fetch(
            Order(number=2, place=first.place, prompt=b"q" * 32, runs=first.runs, rows=first.rows)
        )
        assert "another prompt" in next_of(wants.events, Fetched).why
        next_of(wants.events, Freed)
        wants.fetch(first)
        next_of(sender.events, Joined)
        wants.fetch(Order(number=3, place=first.place, prompt=PROMPT, runs=[], rows=[]))
        assert "joined already" in next_of(wants.events, Fetched).why


def test_both_sides_hear_that_the_other_has_left(sender: PageSender) -> None:
    sender.offer(7, PROMPT)
    context, _ = receiver()
    with context as wants:
        wants.fetch(order(sender))
        next_of(sender.events, Joined)
        wants.leave(1)
        assert "aborted" in next_of(wants.events, Fetched).why
        next_of(wants.events, Freed)
        assert next_of(sender.events, Ended).why
        sender.send(7, Batch(9, 0, 2, PAGES[2:3]))
        assert next_of(sender.events, Read).token == 9  # nobody reads it, so it is free at once
        sender.offer(8, PROMPT)
        wants.fetch(order(sender, room=8))
        next_of(sender.events, Joined)
        sender.withdraw(8, "the request was aborted there")
        assert next_of(wants.events, Fetched).why == "the request was aborted there"


def test_nobody_there_is_told_soon() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    context, _ = receiver()
    with context as wants:
        start_s = time.monotonic()
        place = Handover("127.0.0.1", port, 1)
        wants.fetch(Order(number=1, place=place, prompt=PROMPT, runs=[], rows=[]))
        assert "nobody is reached" in next_of(wants.events, Fetched).why
        assert time.monotonic() - start_s < 3


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


HELLO = framed(msgspec.msgpack.encode(Hello(messages.PROTOCOL, "model", 16)))


@pytest.mark.parametrize(
    "sent",
    [
        b"\x80\x04\x95",
        MAGIC + b"\xff\xff\xff\xff",
        MAGIC + framed(b"\xc1" * 100),
        MAGIC + framed(b"\x91" * 5000),
        MAGIC + HELLO + HELLO,
        MAGIC + HELLO + framed(msgspec.msgpack.encode(Want(7, b"", [Run(5, 0, 1)]))),
        MAGIC + HELLO + framed(msgspec.msgpack.encode(Want(7, b"", [Run(0, -3, 1)]))),
        MAGIC + HELLO + framed(msgspec.msgpack.encode(Want(7, b"", [Run(0, 0, 1 << 60)]))),
        b"GET " + b"x" * 20_000,
        b"GET /route?engine_rank=%00&target_dp_group=-1&target_pp_rank=1 HTTP/1.1\r\n\r\n",
    ],
)
def test_strangers_do_no_harm(sender: PageSender, sent: bytes) -> None:
    with closing(socket.create_connection(("127.0.0.1", sender.port), timeout=10)) as stranger:
        with suppress(OSError):
            stranger.sendall(sent)
        answer = b""
        with suppress(OSError):
            while piece := stranger.recv(4096):
                answer += piece
    assert len(answer) < 1000
    sender.offer(7, PROMPT)
    context, _ = receiver()
    with context as wants:
        wants.fetch(Order(number=1, place=order(sender).place, prompt=PROMPT, runs=[], rows=[]))
        next_of(sender.events, Joined)
        sender.finish(7)
        assert next_of(wants.events, Fetched).why == ""


def test_a_segment_is_only_ours_and_only_inside() -> None:
    own = OwnSegment([(2, 100)])
    try:
        peer = PeerSegment(own.place, (100,))
        peer.row(0, 1)[:] = 7
        assert own.rows[0][1].tolist() == [7] * 100
        for index in (-1, 10**6, 10**18):
            with pytest.raises(ValueError, match="outside"):
                peer.row(0, index)
        asked = partial(msgspec.structs.replace, own.place)
        for place, why in [
            (asked(name="../etc/passwd"), "no segment"),
            (asked(name="sapwood-pages-" + "0" * 32), "another file"),
            (asked(begins=(0, 0)), "no segment"),
            (asked(handle=0), "another file"),
        ]:
            with pytest.raises(ValueError, match=why):
                PeerSegment(place, (100,))
        with pytest.raises(OSError, match="No such"):
            PeerSegment(asked(process=2**40), (100,))
    finally:
        own.close()


def test_a_slow_stranger_is_let_go(sender: PageSender) -> None:
    with closing(socket.create_connection(("127.0.0.1", sender.port), timeout=5)) as stranger:
        stranger.sendall(MAGIC)
        assert stranger.recv(1) == b""


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/health", b"200", b"OK"),
        ("/route?engine_rank=-1&target_dp_group=-1&target_pp_rank=-1", b"200", b'page_size": 16'),
        ("/route?engine_rank=0&target_dp_group=0&target_pp_rank=0", b"200", b'"rank_port"'),
        ("/route?engine_rank=3&target_dp_group=0&target_pp_rank=0", b"404", b"one rank"),
        ("/route", b"400", b"engine_rank"),
        ("/metrics", b"404", b"/route"),
    ],
)
def test_the_bootstrap_service_answers_as_sglangs(
    sender: PageSender, path: str, status: bytes, word: bytes
) -> None:
    with closing(socket.create_connection(("127.0.0.1", sender.port), timeout=5)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    assert answer.split(b" ")[1] == status
    assert word in answer
